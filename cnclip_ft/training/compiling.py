"""Towers compiled for the steps of a stage, and for nothing else: judging has other shapes every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch._dynamo
from torch import nn

from cnclip_ft.models.contract import ImageTower, Tower
from cnclip_ft.models.dual_encoder import DualEncoder

Wanted = bool | Literal["layers", "max-autotune"]

# A graph for every shape: texts come in a few lengths (`data.pairs.fixed_lengths`), and kernels for any length are slower.
COMPILER: dict[str, Any] = {"dynamic": False}


def compile_towers(model: DualEncoder, wanted: Wanted = True) -> None:
    """From now on both towers are compiled at their first call of a shape; what was compiled for a stage before is dropped.

    Args:
        wanted: ``layers`` compiles one layer, which stands for all that are alike: seconds where a whole tower takes a minute.
            ``max-autotune`` tries many kernels for every product. Not with graphs of kernels recorded by CUDA: batches that
            fill a card launch kernels faster than it computes them, and divided batches keep features that such a graph overwrites.
    """
    torch.compiler.reset()
    # Beyond so many graphs of one function none is made any more. Layers share one (transformers' wrapper for checkpointing).
    torch._dynamo.config.recompile_limit = 64
    mode: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if wanted == "max-autotune" else {}
    for tower in (model.image_tower, model.text_tower):
        # On a CPU the layers of texts are given tokens without padding, another number in every batch.
        by_layers = wanted == "layers" and (isinstance(tower, ImageTower) or model.device.type != "cpu")
        for module in (list(_layers(tower)) if by_layers else []) or [tower]:
            forward = type(module).forward.__get__(module)  # of the class: a stage before may have compiled it
            module.forward = torch.compile(forward, **mode, **COMPILER)


def _layers(tower: Tower) -> Iterator[nn.Module]:
    """What lies between stem and projection, as FSDP2 takes it; none in a tower that is not called layer by layer."""
    for block in tower.blocks()[1:-1]:
        yield block[0] if isinstance(block, nn.ModuleList) else block


def uncompiled() -> AbstractContextManager[None]:
    """Inside, towers run as they are written."""
    return torch.compiler.set_stance("force_eager")
