"""What towers of several families are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.runtime import to_device

CONVOLUTIONS_LIKE = ("cuda",)
"""Kinds of devices whose convolutions want the channels together in memory: tensor cores do (PyTorch's channels-last tutorial); on
two CPU cores it was 2 %."""


def convolutional(trunk: nn.Module) -> bool:
    """Whether convolutions do the work: more of them than the one that makes patches."""
    return sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) > 1


def new_projection(width: int, output_dim: int) -> nn.Linear:
    """A bias-free map to the common dimension with fresh weights that keep the scale."""
    projection = nn.Linear(width, output_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Gradient checkpointing of a model of transformers."""
    if wanted:
        # transformers renamed the call late in version 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # works with frozen inputs and under DistributedDataParallel
    else:
        # What transformers' own call does; that one warns of its coming name from version 5.20 on.
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def class_config(model: DualEncoder, config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """`config.json` of which transformers makes its class `architecture`."""
    dtype = str(model.dtype).removeprefix("torch.")
    return config.to_dict() | {"architectures": [architecture], "dtype": dtype}


def processor_config(model: DualEncoder, image_processor: str, processor: str) -> dict[str, Any]:
    """`preprocessor_config.json` for these classes of transformers; what it leaves out, their defaults would say otherwise."""
    names = {"image_processor_type": image_processor, "processor_class": processor}
    return names | model.image_tower.preprocessing.processor()


def drop_patches(patches: torch.Tensor, share: float) -> torch.Tensor:
    """``[n, patches, width]`` → ``[n, kept, width]``, drawn per picture (arXiv 2212.00794)."""
    count = patches.shape[1]
    kept = max(1, round(count * (1 - share)))
    # Drawn on the CPU generator, so that a replayed step draws the same on every device.
    order = to_device(torch.rand(len(patches), count).argsort(1)[:, :kept], patches.device)
    return patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))


def square_grid(side: int, patch: int, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """`Patches.grid` and `Patches.seen` of squares of `side` pixels; what no whole patch covers is not seen."""
    count = side // patch
    # Not `len`: a graph that is written down would be of that many pictures alone.
    grid = torch.full((pixels.shape[0], 2), count, device=pixels.device)
    return grid, (count * patch / side,) * 2
