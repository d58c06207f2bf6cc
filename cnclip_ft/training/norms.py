"""How large gradients are and how far a step moves the weights, for each part of a model that trains.

Parts are the trunk and the projection of each tower, the temperature (with its bias) and the heads. Numbers stay on the device until
they are read with the others of the step. Under FSDP2 every device adds up its shares, and one sum of a few numbers is exchanged.

The movement comes out of AdamW's moments (arXiv 1711.05101): copies of the weights would take as much memory as the weights. It costs a
walk over weights and moments, about what the optimizer's step costs, and room for a few tensors of the largest size; so it is for steps
that are logged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cnclip_ft.training.optimizer import Entry
from cnclip_ft.training.sharding import Whole, is_sharded

Movement = Callable[[nn.Parameter], "torch.Tensor | None"]


def part_of(entry: Entry) -> str:
    """``image_trunk``, ``image_projection``, ``text_trunk``, ``text_projection``, ``temperature`` or ``heads``."""
    if entry.tower not in ("image", "text"):
        return entry.tower
    return f"{entry.tower}_{'projection' if entry.projection else 'trunk'}"


class Norms:
    """L2 norms over all that trains of each part; of low-rank updates their matrices are what trains.

    Args:
        entries: over the parameters the optimizer has.
    """

    def __init__(self, entries: list[Entry], optimizer: torch.optim.AdamW, sharding: Whole) -> None:
        self.optimizer, self.sharding = optimizer, sharding
        self.parts: dict[str, list[nn.Parameter]] = {}
        for entry in entries:
            if entry.rate:
                self.parts.setdefault(part_of(entry), []).append(entry.parameter)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the gradients as they are, by part."""
        return self._norms(lambda parameter: parameter.grad)

    @torch.no_grad()
    def relative_updates(self) -> dict[str, torch.Tensor]:
        """How far the last step moved the weights, over the norm of the weights, by part. Before the gradients are let go of.

        What holds the temperature at its limit comes behind the step, and is not in it.
        """
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}

        def moved(parameter: nn.Parameter) -> torch.Tensor | None:
            state, group = self.optimizer.state.get(parameter), groups[parameter]
            if not state or parameter.grad is None:
                return None
            step, (first, second) = state["step"], group["betas"]
            mean, square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
            root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
            forward = mean.div(root).mul_(group["lr"] / (1 - first**step))
            # The step was p ← (1 − rate · decay) · p − forward; said by what p is now.
            pull = group["lr"] * group["weight_decay"]
            return forward.add_(_local(parameter.detach()), alpha=pull).div_(1 - pull)

        weights = self._norms(lambda parameter: parameter.detach())
        return {part: norm / weights[part] for part, norm in self._norms(moved).items()}

    @torch.no_grad()
    def _norms(self, of: Movement) -> dict[str, torch.Tensor]:
        squares = {
            sharded: [self._squares(parameters, of, sharded) for parameters in self.parts.values()]
            for sharded in (True, False)
        }
        total = self.sharding.sum_of_shares(torch.stack(squares[True])) + torch.stack(squares[False])
        return dict(zip(self.parts, total.sqrt().unbind(), strict=True))

    @staticmethod
    def _squares(parameters: list[nn.Parameter], of: Movement, sharded: bool) -> torch.Tensor:
        """The sum of squares over those that are spread over the devices (this device's shares), or over the others."""
        total = torch.zeros((), device=parameters[0].device)
        for parameter in parameters:
            if is_sharded(parameter) is sharded and (tensor := of(parameter)) is not None:
                total += torch.linalg.vector_norm(_local(tensor), dtype=total.dtype).square()
        return total


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined] # of a DTensor
