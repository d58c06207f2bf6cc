"""CLIP's modified ResNet (arXiv 2103.00020) with the official parameter names; transformers has none.

Three 3×3 convolutions for a stem, an average pool before every strided convolution, and attention pooling whose
query is the mean token. `depth`, `width` and `heads` scale it down for small data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from pydantic import Field
from torch import nn

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.families.chinese_clip.catalog import ResNet
from cnclip_ft.models.families.fresh import check_new_size, from_recipe
from cnclip_ft.models.families.numbers import resize_positions, unusual_rule, with_picture_rule
from cnclip_ft.models.families.parts import CONVOLUTIONS_LIKE
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.schema import Layers, PictureRule, Pixels, Width
from data_tools.errors import RequestError

POSITIONS = "visual.attnpool.positional_embedding"


class Resnet(PictureRule):
    kind: Literal["resnet"]
    layers: Annotated[list[Layers], Field(min_length=1, max_length=8)]
    width: Width
    heads: Width
    image_size: Pixels


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            pool = nn.AvgPool2d(stride)
            parts = [("-1", pool), ("0", nn.Conv2d(inputs, outputs, 1, bias=False)), ("1", nn.BatchNorm2d(outputs))]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Multi-head attention of the mean token over all places of the feature map."""

    def __init__(self, side: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.c_proj = nn.Linear(width, outputs)
        self.heads = heads
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)  # [n, places, width]
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        n, _, width = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(n, -1, self.heads, width // self.heads).transpose(1, 2)

        out = F.scaled_dot_product_attention(split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x)))
        return self.c_proj(out.transpose(1, 2).reshape(n, width))


class ModifiedResNet(nn.Module):
    """Normalised pixels ``[n, 3, s, s]`` → ``[n, outputs]``."""

    def __init__(self, layers: tuple[int, ...], width: int, heads: int, image_size: int, outputs: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        self.depth = len(layers)
        for number, count in enumerate(layers):
            planes = width * 2**number
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(channels, planes, 2 if block == 0 and number > 0 else 1))
                channels = planes * Bottleneck.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        side = image_size // (4 * 2 ** (len(layers) - 1))
        self.attnpool = AttentionPool(side, channels, heads, outputs)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                # Keeps the scale of the signal through a new tower, so that its features tell pictures apart (torch's
                # own default shrinks it until position embeddings are all that is left).
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            if name.endswith("bn3.weight") and name.startswith("layer"):
                nn.init.zeros_(parameter)  # a block starts as its shortcut

    def stages(self) -> list[nn.Module]:
        return [getattr(self, f"layer{number + 1}") for number in range(self.depth)]

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        for number in (1, 2, 3):
            conv, norm = getattr(self, f"conv{number}"), getattr(self, f"bn{number}")
            x = F.relu(norm(conv(x)))
        return self.avgpool(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages():
            x = stage(x)
        return self.attnpool(x)


class ResNetTower(ImageTower):
    """RN50's image tower and smaller ones like it; the pooling projects, so `project` is the identity."""

    channels_last_on = CONVOLUTIONS_LIKE

    kind, schema = "resnet", Resnet
    preprocessing: SquarePicture
    file_prefixes = ("visual.",)

    def __init__(self, numbers: ResNet, output_dim: int) -> None:
        super().__init__()
        self.visual = ModifiedResNet(numbers.layers, numbers.width, numbers.heads, numbers.image_size, output_dim)
        self.preprocessing = SquarePicture(numbers.image_size)
        self.numbers, self.output_dim = numbers, output_dim
        self.checkpointing = False

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> ResNetTower:
        shape = {key: numbers[key] for key in ("layers", "width", "heads", "image_size")}
        return with_picture_rule(cls(ResNet(**shape | {"layers": tuple(shape["layers"])}), output_dim), numbers)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int, image_size: int | None = None) -> ResNetTower:
        found = from_recipe(ResNet, numbers, "image")
        found = replace(found, image_size=check_new_size(image_size or found.image_size, _step(found.layers)))
        return cls(found, output_dim)

    @classmethod
    def resized(
        cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        return resize_positions(numbers, tensors, POSITIONS, _step(numbers["layers"]), image_size)

    @property
    def projection(self) -> None:
        return None

    def replace_projection(self, output_dim: int) -> NoReturn:
        raise RequestError(
            f"model.start.projection is {output_dim}, but the pooling of the image tower gives {self.output_dim}: model.start.projection=null"
        )

    def describe(self) -> dict[str, Any]:
        return asdict(self.numbers) | unusual_rule(self.preprocessing)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        if not (self.checkpointing and self.training):
            return self.visual(pixels)
        x = self.visual.stem(pixels)
        for stage in self.visual.stages():
            x = torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)
        return self.visual.attnpool(x)

    def blocks(self) -> list[nn.Module]:
        v = self.visual
        return [nn.ModuleList([v.conv1, v.bn1, v.conv2, v.bn2, v.conv3, v.bn3]), *v.stages(), v.attnpool]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        self.checkpointing = wanted


def _step(layers: Sequence[int]) -> int:
    """What the side of a picture is a multiple of."""
    return 4 * 2 ** (len(layers) - 1)
