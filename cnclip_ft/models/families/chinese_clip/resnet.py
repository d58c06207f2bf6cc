"""CLIP's modified ResNet (arXiv 2103.00020) with the official parameter names; transformers has none.

Three 3×3 convolutions for a stem, an average pool before every strided convolution, and attention pooling whose
query is the mean token. `depth`, `width` and `heads` scale it down for small data.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


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
