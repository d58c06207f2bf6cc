"""What towers of several families are made of."""

from __future__ import annotations

from typing import Any

from torch import nn


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
