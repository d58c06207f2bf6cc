"""What came of a step: numbers that the device sends when it has done it, read one step later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from cnclip_ft.runtime import Reading


@dataclass(frozen=True)
class Outcome:
    """What came of a step (from 1): numbers of the device, temperature and bias as the step left them."""

    step: int
    rate: float
    loss: float
    accuracy: float
    norm: float  # of all gradients, before they were clipped
    usable: float  # 0: its loss or gradient is no number, and it was left out
    logit_scale: float
    logit_bias: float | None = None
    parts: dict[str, float] = field(default_factory=dict)  # of the loss
    gradient_norms: dict[str, float] = field(default_factory=dict)  # by part of the model, of steps that are logged
    relative_updates: dict[str, float] = field(default_factory=dict)  # as the norms


class UnderWay:
    """A step that was given to the device. Called, it waits for the device to have done it.

    Args:
        step: from 0.
        numbers: scalars by their names in `Outcome`.
        named: scalars by name, for each dictionary of `Outcome`.
    """

    def __init__(
        self, step: int, rate: float, numbers: Mapping[str, torch.Tensor], **named: Mapping[str, torch.Tensor]
    ) -> None:
        self.step, self.rate, self._kinds = step, rate, tuple(named)
        flat = {("", name): value for name, value in numbers.items()}
        flat |= {(kind, name): value for kind, inner in named.items() for name, value in inner.items()}
        self._names = list(flat)
        self._reading = Reading({str(number): value.reshape(()) for number, value in enumerate(flat.values())})

    def __call__(self) -> Outcome:
        sorted_out: dict[str, dict[str, float]] = {kind: {} for kind in ("", *self._kinds)}
        for (kind, name), value in zip(self._names, self._reading().values(), strict=True):
            sorted_out[kind][name] = value
        numbers = sorted_out.pop("")
        if not numbers["usable"] or not math.isfinite(numbers["norm"]):  # it was left out: nothing moved
            sorted_out |= dict.fromkeys(("gradient_norms", "relative_updates"), {})
        return Outcome(step=self.step + 1, rate=self.rate, **numbers, **sorted_out)  # type: ignore[arg-type]
