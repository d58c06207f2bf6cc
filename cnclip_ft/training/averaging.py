"""Moving average of the trained weights (EMA), judged and kept instead of the raw ones."""

from __future__ import annotations

from typing import Any

import torch

from cnclip_ft.training.optimizer import Entry
from cnclip_ft.training.sharding import is_sharded


class MovingAverage:
    """``average ← decay · average + (1 − decay) · weights``; the first steps use a shorter memory, (1 + n) / (10 + n)."""

    def __init__(self, entries: list[Entry], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = {entry.name: entry.parameter for entry in entries if entry.rate}
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for sharded in (True, False):  # shares and whole tensors do not mix in one call
            names = [name for name, parameter in self.parameters.items() if is_sharded(parameter) is sharded]
            if names:
                averages, weights = ([group[name] for name in names] for group in (self.average, self.parameters))
                torch._foreach_lerp_(averages, weights, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)
