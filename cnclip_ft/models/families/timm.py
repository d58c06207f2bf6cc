"""timm's image towers as open_clip has them: a model of timm by name, its pooling, and a map into the common space.

The library is an extra; a description names one of its registered models and nothing that would be fetched.
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from accelerate import init_empty_weights
from pydantic import Field, model_validator
from torch import nn

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import METHODS, LastBlock, Patches, Tokens, changed
from cnclip_ft.models.families.numbers import unusual_rule, with_picture_rule
from cnclip_ft.models.families.parts import CONVOLUTIONS_LIKE, convolutional
from cnclip_ft.models.family import Family
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.schema import PictureRule, Pixels
from data_tools.errors import RequestError

Head = Literal["linear", "mlp", "none", ""]


class Timm(PictureRule):
    """`head`: ``linear`` and ``mlp`` are behind the trunk; ``none`` is nothing; empty is the trunk's own classifier."""

    kind: Literal["timm"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9_.]+$", max_length=100)]
    pool: Annotated[str, Field(pattern=r"^[a-z_]*$", max_length=20)]
    head: Head
    head_bias: bool
    image_size: Pixels

    @model_validator(mode="after")
    def _known(self) -> Timm:
        if self.pool in ("abs_attn", "rot_attn"):
            raise ValueError(f"pool {self.pool!r} is not done here")
        return self


def library() -> ModuleType:
    """
    Raises:
        RequestError: timm is not installed, or does not go with this torch.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that is not of this torch raises the second
        raise RequestError(
            f"an image tower of timm, which cannot be imported ({str(error)[:120]}): pip install 'cnclip-ft[timm]', with the torchvision "
            "that belongs to this torch"
        ) from None
    return timm


class TimmModel(nn.Module):
    """Trunk and head under open_clip's names."""

    def __init__(self, name: str, pool: str, head: Head, head_bias: bool, output_dim: int) -> None:
        super().__init__()
        timm = library()
        try:
            if head in ("linear", "mlp"):
                self.trunk = timm.create_model(name, pretrained=False)
                self.trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
            else:
                self.trunk = timm.create_model(
                    name, pretrained=False, num_classes=0 if head == "none" else output_dim, global_pool=pool
                )
        except Exception as error:  # noqa: BLE001 - a name timm does not have, a pooling a model does not have
            raise RequestError(
                f"timm {timm.__version__} cannot make {name} with pooling {pool!r}: {str(error)[:200]}"
            ) from None
        width, parts = self.trunk.num_features, OrderedDict[str, nn.Module]()
        if head == "linear":
            parts["drop"], parts["proj"] = nn.Dropout(0.0), nn.Linear(width, output_dim, bias=head_bias)
        elif head == "mlp":
            parts["mlp"] = timm.layers.Mlp(width, 2 * output_dim, output_dim, bias=(True, head_bias))
        self.head = nn.Sequential(parts)


class TimmTower(ImageTower):
    kind, schema = "timm", Timm
    file_prefixes = ("visual.",)
    can_be_new = False
    preprocessing: SquarePicture

    def __init__(self, numbers: dict[str, Any], output_dim: int) -> None:
        super().__init__()
        self.numbers = {key: numbers[key] for key in ("name", "pool", "head", "head_bias", "image_size")}
        # Weights without memory, whatever device is the default; buffers are numbers that may stand in no file.
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            self.visual = TimmModel(numbers["name"], numbers["pool"], numbers["head"], numbers["head_bias"], output_dim)
        self.channels_last_on = CONVOLUTIONS_LIKE if convolutional(self.visual.trunk) else ()
        self.preprocessing = SquarePicture(numbers["image_size"])
        self.output_dim = output_dim

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> TimmTower:
        return with_picture_rule(cls(numbers, output_dim), numbers)

    @property
    def projection(self) -> nn.Module | None:
        return self.visual.head if len(self.visual.head) else None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | self.numbers | unusual_rule(self.preprocessing)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual.trunk(pixels)

    @property
    def patch_methods(self) -> tuple[str, ...]:
        """Of timm's plain ViT; its other kinds of towers have maps and blocks of many builds."""
        trunk = self.visual.trunk
        plain = type(trunk).__name__ == "VisionTransformer" and _whole(trunk.blocks[-1])
        return METHODS if plain and trunk.global_pool in ("token", "avg", "map") else ()

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        trunk = self.visual.trunk
        hidden = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(pixels)))
        for block in trunk.blocks[:-1]:
            hidden = block(hidden)
        grid = self._grid(pixels)
        found = trunk.norm(changed(_parts(trunk.blocks[-1]), hidden, method, grid[:1], prefix=trunk.num_prefix_tokens))
        # What pooling gives of one patch alone: itself, or of a pooling by attention its value path.
        each = found.flatten(0, 1)
        each = trunk.attn_pool(each[:, None]) if trunk.attn_pool is not None else each
        each = trunk.head(trunk.head_drop(trunk.fc_norm(each)))
        return Patches(self.project(each).unflatten(0, found.shape[:2]), grid)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        self.check_patches()
        trunk = self.visual.trunk
        hidden = trunk.forward_features(pixels)
        return Tokens(hidden[:, trunk.num_prefix_tokens :], trunk.forward_head(hidden), self._grid(pixels))

    def _grid(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.visual.trunk.patch_embed.grid_size, device=pixels.device).expand(pixels.shape[0], 2)

    def blocks(self) -> list[nn.Module]:
        """As timm groups its layers, the head last."""
        trunk = self.visual.trunk
        groups = library().models.group_parameters(trunk, trunk.group_matcher())
        found = [nn.ParameterList(map(trunk.get_parameter, groups[number])) for number in sorted(groups)]
        return [*found, *([self.visual.head] if len(self.visual.head) else [])]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        without = self.visual.trunk.no_weight_decay() if hasattr(self.visual.trunk, "no_weight_decay") else ()
        return parameter.ndim >= 2 and name.removeprefix("visual.trunk.") not in without

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        self.visual.trunk.set_grad_checkpointing(wanted)


def _whole(block: Any) -> bool:
    """Whether timm's block is pre-norm with one plain attention."""
    attention = getattr(block, "attn", None)
    return (
        type(block).__name__ == "Block"
        and type(attention).__name__ == "Attention"
        and getattr(attention, "gate", None) is None
    )


def _parts(block: Any) -> LastBlock:
    own = block.attn

    def take(number: int, norm: nn.Module | None = None) -> Any:
        def of(normed: torch.Tensor) -> torch.Tensor:
            found = own.qkv(normed).chunk(3, 2)[number]
            return found if norm is None else norm(found.unflatten(2, (own.num_heads, -1))).flatten(2)

        return of

    return LastBlock(
        block.norm1,
        take(0, own.q_norm),
        take(1, own.k_norm),
        take(2),
        lambda mixed: block.ls1(own.proj(own.norm(mixed))),
        lambda hidden: hidden + block.ls2(block.mlp(block.norm2(hidden))),
        own.num_heads,
    )


class TimmFamily(Family):
    image_towers = (TimmTower,)


FAMILY = TimmFamily()
