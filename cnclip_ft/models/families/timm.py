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


class TimmFamily(Family):
    image_towers = (TimmTower,)


FAMILY = TimmFamily()
