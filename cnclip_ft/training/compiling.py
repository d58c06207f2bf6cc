"""Towers compiled for the steps of a stage, and for nothing else: judging has other shapes every time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from cnclip_ft.models.dual_encoder import DualEncoder

# A graph for every shape: texts come in a few lengths (`data.pairs.fixed_lengths`), and kernels for any length are slower.
COMPILER: dict[str, Any] = {"dynamic": False}


def compile_towers(model: DualEncoder) -> None:
    """From now on both towers are compiled at their first call of a shape; what was compiled for a stage before is dropped."""
    torch.compiler.reset()
    for tower in (model.image_tower, model.text_tower):
        # Not tower.compile(): graphs of all modules compiled so are counted together, and beyond eight none is made.
        tower.forward = torch.compile(type(tower).forward.__get__(tower), **COMPILER)  # type: ignore[method-assign] # this tower's own


def uncompiled() -> AbstractContextManager[None]:
    """Inside, towers run as they are written."""
    return torch.compiler.set_stance("force_eager")
