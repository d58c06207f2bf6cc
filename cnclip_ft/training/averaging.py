"""Moving average of the trained weights (EMA), judged and kept instead of the raw ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cnclip_ft.training.optimizer import Entry


class MovingAverage:
    """``average ← decay · average + (1 − decay) · weights``; the first steps use a shorter memory, (1 + n) / (10 + n)."""

    def __init__(self, table: list[Entry], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = {entry.name: entry.parameter for entry in table if entry.rate}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The averaged weights stand in the model inside this context."""
        raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(raw[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)
