"""What a stage needs on each device: weights, gradients, optimizer, and what the forward keeps for the backward.

The last part is measured, not guessed: one pair goes through the towers as the stage would send it, and the bytes
autograd keeps are counted (torch.autograd.graph.saved_tensors_hooks); on a CPU all that is alive at once, backward included.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.modes import evaluation_mode, modes_kept
from cnclip_ft.runtime import KEPT, available_memory, can_keep
from cnclip_ft.training.compiling import uncompiled
from cnclip_ft.training.context import Context
from cnclip_ft.training.lora import trained_size
from cnclip_ft.training.sharding import Sharded
from cnclip_ft.training.stage_plan import StagePlan
from data_tools.words import Said

# Share of the available memory that is planned with. Validation and loaders want some, and the estimate may be a quarter off.
MARGIN = 0.8
# A run that needs more than this times what is available is not begun: neither the quarter nor files given up can make up for it.
HOPELESS = 1.5


@dataclass
class Memory:
    """Bytes per device.

    Attributes:
        available: what can still be had, the weights being there already; None where it is not known.
        at_once: pairs of a forward and backward as the stage wants it.
        fitting: pairs at once that it is enough for: the share of a batch or the largest of its halves.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    available: int | None
    at_once: int
    fitting: int

    @property
    def total(self) -> int:
        return self.weights + self.to_come

    @property
    def to_come(self) -> int:
        return self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        return self.in_words

    @property
    def in_words(self) -> Said:
        """For the plan."""
        return Said(
            "about {total:.2f} GiB (weights {weights:.2f} + gradients {gradients:.2f} + optimizer {optimizer:.2f} + activations "
            "{activations:.2f})",
            "约 {total:.2f} GiB（权重 {weights:.2f} + 梯度 {gradients:.2f} + 优化器 {optimizer:.2f} + 激活 {activations:.2f}）",
            total=self.total / 2**30,
            weights=self.weights / 2**30,
            gradients=self.gradients / 2**30,
            optimizer=self.optimizer / 2**30,
            activations=self.activations / 2**30,
        )

    def shortage(self, stage: str, factor: float = 1.0) -> str | None:
        """What to say when more than `factor` times the available memory is needed."""
        if self.available is None or self.to_come <= factor * self.available:
            return None
        way = Said(
            "Train fewer layers or a smaller model, or use a machine with more",
            "请训练更少的层或更小的模型，或换内存更大的机器",
        )
        if self.fitting < self.at_once:
            way = Said(
                "Give stages.{stage}.micro_batch_size={fitting} (same gradient; batch normalisation in training mode "
                "needs stages.{stage}.batch_norm=frozen for it)",
                "请设 stages.{stage}.micro_batch_size={fitting}（梯度不变；训练状态的批归一化还需 stages.{stage}.batch_norm=frozen）",
                stage=stage,
                fitting=self.fitting,
            )
        return Said(
            "{stage}: training takes about {wanted:.1f} GiB more than the process has now, and {available:.1f} GiB are available "
            "to it. {way}",
            "{stage}：训练比进程现有的还要多约 {wanted:.1f} GiB，可用的有 {available:.1f} GiB。{way}",
            stage=stage,
            wanted=self.to_come / 2**30,
            available=self.available / 2**30,
            way=way,
        )


@contextmanager
def heads_at_hand(plan: StagePlan, model: DualEncoder) -> Iterator[None]:
    """Inside, a model that has yet to be given heads for the stage has some."""
    before = model.heads
    if plan.grounding is not None and before is None:
        model.heads = plan.grounding.heads
    try:
        yield
    finally:
        model.heads = before


def estimate(context: Context, plan: StagePlan, model: DualEncoder) -> Memory:
    """The stage's memory per device; the state of an average (EMA) counts as optimizer."""
    with heads_at_hand(plan, model):
        return _estimate(context, plan, model)


def _estimate(context: Context, plan: StagePlan, model: DualEncoder) -> Memory:
    setting = plan.setting
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if trunk_waits(context, plan) and context.device.type != "cpu":
        weights -= sum(p.numel() * p.element_size() for p in model.trunk_parameters())
    trained = 4 * sum(map(trained_size, plan.entries))
    if isinstance(context.sharding, Sharded):
        weights, trained = (size // context.world for size in (weights, trained))
    if plan.distilling is not None:
        weights += plan.distilling.teacher.bytes  # whole on every device
    if plan.grounding is not None and plan.grounding.stay:
        weights *= 2  # the model as it was
    optimizer = (3 if setting.ema else 2) * trained
    known = _measured.setdefault(model, [])  # plan, its warnings and the check before a run ask the same
    per_pair = next((size for other, size in known if _as_much(other, plan)), None)
    if per_pair is None:
        per_pair = bytes_per_pair(context, plan, model)
        known.append((plan, per_pair))
    available = None
    if context.device.type == "cpu":
        available = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", context.world))

    def fits(size: int) -> bool:
        return available is None or trained + optimizer + size * per_pair <= MARGIN * available

    fitting = largest_half(plan.share, fits)
    wanted = setting.micro_batch_size or plan.share
    at_once = fitting if wanted == "auto" else min(wanted, plan.share)
    return Memory(weights, trained, optimizer, at_once * per_pair, available, at_once, fitting)


def trunk_waits(context: Context, plan: StagePlan) -> bool:
    """Whether the image trunk lies in the host's memory while the stage trains: steps take its features from the cache."""
    return plan.cached and not isinstance(context.sharding, Sharded)


_measured: weakref.WeakKeyDictionary[DualEncoder, list[tuple[StagePlan, int]]] = weakref.WeakKeyDictionary()


def _as_much(one: StagePlan, other: StagePlan) -> bool:
    alike = one.cached == other.cached and one.checkpointing == other.checkpointing
    texts = one.texts_per_pair == other.texts_per_pair and one.texts_kept == other.texts_kept
    return one.entries is other.entries and alike and texts and one.setting.augment.size == other.setting.augment.size


def largest_half(share: int, fits: Callable[[int], bool]) -> int:
    """`share`, or the first of its halves (rounded up) that fits; 1 is not tried."""
    size = share
    while size > 1 and not fits(size):
        size = -(-size // 2)
    return size


def tokens_per_text(context: Context) -> int:
    """Those of the mean caption; all there can be where padding is attended to."""
    padded = context.tokenizer.padding == "max_length"
    return context.tokenizer.context_length if padded else max(int(context.pairs.lengths.mean()), 2)


def bytes_per_pair(context: Context, plan: StagePlan, model: DualEncoder) -> int:
    """What one pair of the mean caption length takes: what autograd keeps of it; on a CPU, what the process will hold."""
    tokens = tokens_per_text(context)
    pair = blank_pairs(plan, model, 1, tokens)
    with _as_in_training(plan, model):
        if context.device.type != "cpu":
            kept = []
            for count in (1, 2):  # copies of the weights in 16 bits are kept too, once for all pairs
                with _counted(model) as counted, context.autocast(), uncompiled():
                    model(**blank_pairs(plan, model, count, tokens))
                kept.append(sum(counted.values()))
            return kept[1] - kept[0]
        trained = [p for p in model.parameters() if p.requires_grad]
        with _Alive(model) as alive:
            with context.autocast():
                found = model(**pair)
            features = torch.stack([part.sum() for part in found if part is not None]).sum()
            if features.requires_grad:
                torch.autograd.grad(features, trained, allow_unused=True)
    return int(alive.most * (KEPT if keeps(plan) and can_keep() else 1))


def keeps(plan: StagePlan) -> bool:
    """Whether the stage keeps freed memory for its speed: not where activations are computed again to save memory."""
    return not any(plan.checkpointing.values())


class _Alive(TorchDispatchMode):
    """`most` bytes alive at once of all tensors made inside; gradients of the model's parameters, known by their shape, apart."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._shapes = {tuple(sorted(p.shape)) for p in model.parameters()}
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tuple(sorted(tensor.shape)) not in self._shapes:
                for storage in _storages(tensor):
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._known:
            self._known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a tensor's numbers lie: of one in 8 bits those of its parts, it has none of its own."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def blank_pictures(plan: StagePlan, model: DualEncoder, count: int) -> torch.Tensor:
    """As the steps see them, with nothing on them."""
    whole, side = model.image_tower.example(count), plan.setting.augment.size
    return whole if side is None else whole.new_zeros(*whole.shape[:2], side, side)


def blank_pairs(plan: StagePlan, model: DualEncoder, count: int, tokens: int) -> dict[str, torch.Tensor]:
    """What the stage sends through `model` for `count` pairs of `tokens` each, with nothing to be seen in it."""
    input_ids, attention_mask = model.text_tower.example(count * plan.texts_per_pair, tokens)
    text = {} if plan.texts_kept else {"input_ids": input_ids, "attention_mask": attention_mask}
    if plan.teaching is not None:
        return text
    if plan.grounding is not None:
        return {"region_pixels": model.image_tower.example(count), **text}
    if not plan.cached:
        return {"pixels": blank_pictures(plan, model, count), **text}
    place = next(model.trunk_parameters(), model.logit_scale).device
    # Not in training mode: batch norm would take its statistics from a picture with nothing in it.
    with torch.no_grad(), evaluation_mode(model.image_tower):
        trunk = model.image_trunk(model.image_tower.example(1).to(place)).to(model.device)
    return {"trunk": trunk.repeat(count, *[1] * (trunk.ndim - 1)), **text}


@contextmanager
def _counted(model: DualEncoder) -> Iterator[dict[int, int]]:
    """Bytes by place of everything autograd keeps inside this context, the model's own parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []  # held, so that no place is used twice

    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for storage in _storages(tensor):
            place = storage.data_ptr()
            if place not in own:
                kept.append(tensor)
                sizes[place] = max(sizes.get(place, 0), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
    kept.clear()


@contextmanager
def _as_in_training(plan: StagePlan, model: DualEncoder) -> Iterator[None]:
    """What trains asks for gradients, checkpointing and dropout are on; batch-norm statistics do not move."""
    before = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    for entry in plan.entries:
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
