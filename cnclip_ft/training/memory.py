"""What a stage needs on each device: weights, gradients, optimizer, and what the forward keeps for the backward.

The last part is measured, not guessed: one pair goes through the towers as the stage would send it, and the bytes
autograd keeps are counted (torch.autograd.graph.saved_tensors_hooks).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cnclip_ft.models.modes import modes_kept
from cnclip_ft.training.lora import adapter_size
from cnclip_ft.training.sharding import Sharded

if TYPE_CHECKING:
    from cnclip_ft.training.stage import StageRun


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


def estimate(stage: StageRun) -> Memory:
    """The stage's memory per device; the state of an average (EMA) counts as optimizer."""
    setting, model = stage.stage, stage.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 4 * sum(adapter_size(e) if e.lora else e.parameter.numel() for e in stage.table if e.rate)
    share = setting.batch_size // stage.run.accelerator.num_processes
    at_once = setting.micro_batch_size if isinstance(setting.micro_batch_size, int) else share
    activations = min(at_once, share) * bytes_per_pair(stage)
    if isinstance(stage.run.sharding, Sharded):
        weights, trained = (size // stage.run.accelerator.num_processes for size in (weights, trained))
    return Memory(weights, trained, (3 if setting.ema else 2) * trained, activations)


def bytes_per_pair(stage: StageRun) -> int:
    """What autograd keeps of one pair of the mean caption length."""
    model, run = stage.model, stage.run
    tokens = max(int(run.table.lengths.mean()), 2)
    ids = torch.full((1, tokens), 1000, device=run.device)
    with _as_in_training(stage), _counted(model) as counted, run.autocast():
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        side = model.image_size
        pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=run.device)
        if stage.cached:
            with torch.no_grad():
                trunk = model.image_trunk(pixels)
            model(trunk=trunk, **text)
        else:
            model(pixels=pixels, **text)
    return sum(counted.values())


@contextmanager
def _counted(model):
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
def _as_in_training(stage: StageRun):
    """What trains asks for gradients, checkpointing and dropout are on; batch-norm statistics do not move."""
    model, setting = stage.model, stage.stage
    before = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    for entry in stage.table:
        entry.parameter.requires_grad_(entry.rate > 0)
    model.set_gradient_checkpointing(
        image=setting.gradient_checkpointing in ("image", "both") and not stage.image_frozen,
        text=setting.gradient_checkpointing in ("text", "both"),
    )
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
