"""Image towers by import path (docs/towers.md): any module, in a model with any text tower."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import OWN, Patches, Tokens
from cnclip_ft.models.families.parts import CONVOLUTIONS_LIKE, new_projection
from cnclip_ft.models.family import Family
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.schema import Part, Pixels
from data_tools.errors import RequestError

_FEWEST_CONVOLUTIONS = 4  # whose kernels overlap: the stem of a transformer may have some


class Foreign(Part):
    """A tower that is code: built only where the user allows it (`build.image_tower`)."""

    kind: Literal["foreign"]
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", max_length=300)]
    image_size: Pixels | None = None  # where it is not the module's own


class ImportedTower(ImageTower):
    """Any module by import path (docs/towers.md), with a new projection on top."""

    kind, schema = "foreign", Foreign
    file_prefixes = ("module.", "visual_projection.")
    can_be_new = False

    def __init__(self, path: str, output_dim: int, image_size: int | None = None) -> None:
        super().__init__()
        self.path = path
        module: Any = _make_foreign(path)
        self.module, self._own_size = module, int(module.image_size)
        self.any_size = bool(getattr(module, "any_size", False))
        if image_size not in (None, self._own_size) and not self.any_size:
            raise RequestError(
                f"image_size {image_size}: {path} takes {self._own_size}: leave it out (model.image_size=null), or any_size = True in a module "
                "that takes squares of any side (docs/towers.md#your-own-image-tower-by-import-path)"
            )
        self.visual_projection = new_projection(module.output_dim, output_dim)
        self.output_dim = output_dim
        self.preprocessing = SquarePicture(
            image_size or self._own_size,
            "squash",
            tuple(module.mean),
            tuple(module.std),
            getattr(module, "input", "normalised"),
        )
        self.channels_last_on = CONVOLUTIONS_LIKE if is_convolutional(module) else ()

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.module(pixels)
        if features.ndim != 2 or features.shape[1] != self.module.output_dim:
            raise RequestError(
                f"{self.path}: the module gave {list(features.shape)} for {len(pixels)} images; "
                f"expected [{len(pixels)}, {self.module.output_dim}] (its own output_dim)"
            )
        return features

    @property
    def patch_methods(self) -> tuple[str, ...]:
        return (OWN,) if callable(getattr(self.module, "patches", None)) else ()

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        features, grid = self._map(pixels)
        return Patches(self.project(features), grid)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        """Walks the module twice: it is asked for its map and for its feature."""
        self.check_patches()
        features, grid = self._map(pixels)
        return Tokens(features, self.trunk(pixels), grid)

    def _map(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.module.patches(pixels)
        width = self.module.output_dim
        if features.ndim != 4 or features.shape[1] != width or features.shape[0] != pixels.shape[0]:
            raise RequestError(
                f"{self.path}: its patches gave {list(features.shape)} for {len(pixels)} images; expected [{len(pixels)}, {width}, rows, "
                "columns] (its own output_dim)"
            )
        grid = torch.tensor(features.shape[2:], device=features.device).expand(pixels.shape[0], 2)
        return features.flatten(2).transpose(1, 2), grid

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> ImportedTower:
        return cls(numbers["factory"], output_dim, numbers.get("image_size"))

    def size_in(self, numbers: dict[str, Any]) -> int:
        return numbers.get("image_size") or self._own_size  # no second run of the code

    @classmethod
    def imports(cls, numbers: dict[str, Any]) -> str | None:
        return numbers["factory"]

    @classmethod
    def resized(
        cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        """The weights stay as they are: the module says whether they see any size, when it is made."""
        return numbers | {"image_size": image_size}, []

    @property
    def projection(self) -> nn.Module:
        return self.visual_projection

    def replace_projection(self, output_dim: int) -> None:
        self.visual_projection, self.output_dim = (
            new_projection(self.visual_projection.in_features, output_dim),
            output_dim,
        )

    def describe(self) -> dict[str, Any]:
        size = {} if self.image_size == self._own_size else {"image_size": self.image_size}
        return {"kind": self.kind, "factory": self.path} | size

    def blocks(self) -> list[nn.Module]:
        module: Any = self.module
        own = module.blocks() if callable(getattr(module, "blocks", None)) else [module]
        return [*own, self.visual_projection]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        if hasattr(self.module, "set_gradient_checkpointing"):
            self.module.set_gradient_checkpointing(wanted)
        elif wanted:
            raise RequestError(
                f"{self.path} has no set_gradient_checkpointing(bool): stages.STAGE.gradient_checkpointing=none"
            )


def is_convolutional(tower: str | nn.Module) -> bool:
    """Whether an imported tower, or the one of an import path, is a network of convolutions without attention; those of a ViT cut
    its patches, or are the stem of one.

    Raises:
        RequestError: it cannot be made.
    """
    if isinstance(tower, ImageTower) and not isinstance(tower, ImportedTower):
        return False
    module = _make_foreign(tower) if isinstance(tower, str) else tower
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    overlapping = [
        layer for layer in layers if any(k > s for k, s in zip(layer.kernel_size, layer.stride, strict=True))
    ]
    attends = any("attention" in type(each).__name__.lower() for each in module.modules())
    return len(overlapping) >= _FEWEST_CONVOLUTIONS and not attends


def is_convolutional_as_made(numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the image tower of a checkpoint is such a network, by an import path, with the weights it is made with. Runs the code.

    Args:
        numbers: a checked description of an image tower.
        tensors: of the checkpoint.

    Raises:
        RequestError: it cannot be made.
    """
    if ImportedTower.kind != numbers["kind"]:
        return False
    module = _make_foreign(numbers["factory"])
    if not is_convolutional(module):
        return False
    made = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    return all(name not in made or torch.equal(tensor.float(), made[name].float()) for name, tensor in tensors.items())


def _make_foreign(path: str) -> nn.Module:
    name, colon, attribute = path.partition(":")
    if not colon:
        raise RequestError(f"{path!r} is neither a folder nor an import path like package.module:factory")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except AttributeError as error:
        raise RequestError(
            f"the image tower {path}: {error}; {name} was found, so look at the name behind the colon"
        ) from None
    except (ImportError, ValueError) as error:
        raise RequestError(
            f"the image tower {path} cannot be imported ({error}). Install the package that holds it, or set PYTHONPATH to its folder"
        ) from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code; one that leaves would end the command as if done
        raise RequestError(f"{path}: importing it failed ({type(error).__name__}: {error})") from error
    try:
        module = factory()
    except RequestError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        raise RequestError(f"{path}: the factory failed ({type(error).__name__}: {error})") from error
    missing = [name for name in ("output_dim", "image_size", "mean", "std") if not hasattr(module, name)]
    said = (
        f"is a {type(module).__name__}"
        if not isinstance(module, nn.Module)
        else f"lacks {', '.join(missing)}"
        if missing
        else ""
    )
    if said:
        raise RequestError(
            f"{path}: the factory must return an nn.Module with output_dim, image_size, mean and std; it {said}"
        )
    if getattr(module, "input", "normalised") not in ("normalised", "uint8"):
        raise RequestError(f"{path}: input is {module.input!r}; use 'normalised' or 'uint8'")
    return module


class Imported(Family):
    image_towers = (ImportedTower,)


FAMILY = Imported()
