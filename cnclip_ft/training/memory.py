"""What a stage needs on each device: weights, gradients, optimizer, and what the forward keeps for the backward.

The last part is measured, not guessed: one pair goes through the towers as the stage would send it, and the bytes
autograd keeps are counted (torch.autograd.graph.saved_tensors_hooks).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.modes import modes_kept
from cnclip_ft.training.context import Context
from cnclip_ft.training.lora import adapter_size
from cnclip_ft.training.sharding import Sharded
from cnclip_ft.training.stage_plan import StagePlan


@dataclass
class Memory:
    """Bytes per device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer),
                 ("activations", self.activations))  # fmt: skip
        said = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
        return f"about {self.total / 2**30:.2f} GiB ({said})"


def estimate(context: Context, plan: StagePlan, model: DualEncoder) -> Memory:
    """The stage's memory per device; the state of an average (EMA) counts as optimizer."""
    setting = plan.setting
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 4 * sum(adapter_size(e) if e.lora else e.parameter.numel() for e in plan.table if e.rate)
    at_once = setting.micro_batch_size if isinstance(setting.micro_batch_size, int) else plan.share
    activations = min(at_once, plan.share) * bytes_per_pair(context, plan, model)
    if isinstance(context.sharding, Sharded):
        weights, trained = (size // context.world for size in (weights, trained))
    return Memory(weights, trained, (3 if setting.ema else 2) * trained, activations)


def bytes_per_pair(context: Context, plan: StagePlan, model: DualEncoder) -> int:
    """What autograd keeps of one pair of the mean caption length."""
    tokens = max(int(context.pairs.lengths.mean()), 2)
    with _as_in_training(plan, model), _counted(model) as counted, context.autocast():
        model(**blank_pairs(plan, model, 1, tokens))
    return sum(counted.values())


def blank_pairs(plan: StagePlan, model: DualEncoder, count: int, tokens: int) -> dict[str, torch.Tensor]:
    """What the stage sends through `model` for `count` pairs of `tokens` each, with nothing to be seen in it."""
    ids = torch.full((count, tokens), 1000, device=model.device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    side = model.image_size
    if not plan.cached:
        return {"pixels": torch.zeros(count, 3, side, side, dtype=torch.uint8, device=model.device), **text}
    with torch.no_grad():
        trunk = model.image_trunk(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device))
    return {"trunk": trunk.repeat(count, *[1] * (trunk.ndim - 1)), **text}


@contextmanager
def _counted(model: DualEncoder) -> Iterator[dict[int, int]]:
    """Bytes by place of everything autograd keeps inside this context, the model's own parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []  # held, so that no place is used twice

    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept.append(tensor)
            sizes[place] = max(sizes.get(place, 0), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    kept.clear()


@contextmanager
def _as_in_training(plan: StagePlan, model: DualEncoder) -> Iterator[None]:
    """What trains asks for gradients, checkpointing and dropout are on; batch-norm statistics do not move."""
    before = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    for entry in plan.table:
        entry.parameter.requires_grad_(entry.rate > 0)
    model.set_gradient_checkpointing(**plan.checkpointing)
    try:
        with modes_kept(model):
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            yield
    finally:
        model.set_gradient_checkpointing(image=False, text=False)
        for parameter, wanted in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)
        torch.set_rng_state(random)
