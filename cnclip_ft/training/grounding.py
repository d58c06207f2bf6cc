"""A stage that learns boxes: what is planned, what is drawn for a step, its gradient.

A batch is of pictures. Each is asked its own phrases and `negatives` others of the store, the same ones for all pictures of a step, but
those that are its own. So a picture's loss (`grounding.matching`) depends on nothing else of the batch: the loss is the mean over the pictures,
micro-batches add up to it, and many devices give the numbers of one. With the picture's unit feature x and those y of its phrases, and what
they were when the stage began, x' and y', a part of it is ``stay · ½(‖x − x'‖² + mean ‖y − y'‖²)``: without it a tower that learns where things
are forgets what pictures are (recall sinks to half).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from cnclip_ft.collectives import sum_over_ranks, world_size
from cnclip_ft.data.boxed import BoxTable, build_box_table
from cnclip_ft.data.mixture import Mixture
from cnclip_ft.grounding.boxes import corners, iou
from cnclip_ft.grounding.matching import Targets, hungarian, inside, losses, match
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.heads import GroundingHeads, Regions, new_heads
from cnclip_ft.models.modes import evaluation_mode
from cnclip_ft.models.preprocessing import at_size
from cnclip_ft.recipe import Stage
from cnclip_ft.runtime import to_device
from cnclip_ft.training.context import Context, open_split, start_of
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import Aim, LossOutput
from cnclip_ft.training.run_state import seed_step
from cnclip_ft.training.sharding import Sharded
from data_tools.errors import RequestError
from data_tools.store import PairSource
from data_tools.words import Said

NEW_HEADS = 10**7 + 1  # the step whose seed new heads are drawn with: beyond that of any other
_OF_PICTURES = ("pixels", "asked", "boxes", "counts", "says")
_HIT = 0.5  # overlap from which on a box is found


@dataclass(frozen=True)
class Grounding:
    """What a stage learns boxes from; `heads` are the model's or as new ones will be: their names and shapes count, not their numbers."""

    store: PairSource
    table: BoxTable
    negatives: int
    stay: float
    heads: GroundingHeads
    new: bool

    @property
    def digest(self) -> str:
        """Tells what it learns from."""
        return f"{self.store.checksum()}-{self.store.order()}"

    def drawn(self, seed: int, step: int) -> torch.Tensor:
        """Phrases every picture of this step is asked beside its own: int64, the same on all devices."""
        if not self.negatives:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(self.table.others(self.negatives, (seed, step)))

    def describe(self) -> list[Said]:
        """Lines of the plan."""
        assert self.table.phrases is not None
        passed = Said(
            "; {count:,} texts without boxes are passed over",
            "；{count:,} 条没有框的文本略过",
            count=self.table.passed_over,
        )
        return [
            Said(
                "    learns {boxes:,} boxes of {phrases:,} phrases in {pictures:,} pictures ({place}){passed}",
                "    学习 {pictures:,} 张图片中 {phrases:,} 个短语的 {boxes:,} 个框（{place}）{passed}",
                boxes=self.table.boxes,
                phrases=len(self.table.phrases),
                pictures=len(self.table),
                place=self.store.path,
                passed=passed if self.table.passed_over else "",
            ),
            Said(
                "    each picture is asked {count} other phrases; heads for boxes and scores {which}",
                "    每张图片另问 {count} 个别的短语；框与分数的头{which}",
                count=self.negatives,
                which=Said("are new", "是新的") if self.new else Said("are the start's", "沿用起点的"),
            ),
            Said(
                "    {stay:g} · squared distance to the features of the stage's start",
                "    {stay:g} · 与阶段起点特征的平方距离",
                stay=self.stay,
            ),
        ]


class Boxes(Aim):
    """Boxes are learnt, by `GroundStep`; pairs are none of it."""

    kind: ClassVar[str] = "ground"
    biased: ClassVar[bool] = False


def plan_grounding(context: Context, model: DualEncoder, name: str, setting: Stage) -> Grounding | None:
    """Open the boxes, and see that they can be learnt.

    Raises:
        RequestError: naming the setting.
    """
    if setting.ground is None:
        return None
    key, place = f"stages.{name}.ground.boxes", setting.ground.boxes
    if place is None and isinstance(context.train_store, Mixture):
        raise RequestError(f"{key}: data.train names several stores; name the one whose boxes are learnt, {key}=DIR")
    if isinstance(context.sharding, Sharded):
        raise RequestError(f"stages.{name}: boxes are learnt with whole weights, not with FSDP2; launch without it")
    hungarian()
    store = open_split(place, key) if place is not None else context.train_store
    assert not isinstance(store, Mixture)
    try:
        with torch.random.fork_rng(), evaluation_mode(model):
            heads = model.heads or new_heads(model.image_tower)
    except RequestError as error:
        raise RequestError(f"stages.{name}: {error}") from None
    table = build_box_table(
        store, context.tokenizer, model.image_tower.preprocessing, key if place is not None else "data.train"
    )
    return Grounding(store, table, setting.ground.negatives, setting.ground.stay, heads, model.heads is None)


def give_heads(context: Context, number: int, grounding: Grounding | None, model: DualEncoder) -> None:
    """Before a stage of this number first learns boxes: the model's heads, the same on every device."""
    if grounding is not None and model.heads is None:
        seed_step(context.recipe.seed, number, NEW_HEADS, 0)
        with evaluation_mode(model):
            model.heads = new_heads(model.image_tower)


def heads_of_state(state: dict[str, torch.Tensor]) -> GroundingHeads | None:
    """Heads as a state of a run has them, for its weights to be put into."""
    found = state.get("heads.feature.weight")
    return None if found is None else GroundingHeads(found.shape[1], found.shape[0])


def as_it_was(
    context: Context, number: int, grounding: Grounding | None, model: DualEncoder, state: dict[str, Any] | None
) -> DualEncoder | None:
    """The model as the stage of this number began with it, frozen, for `stay`; None where nothing has to.

    Where the run gives the start larger pictures than its own, its first stage keeps to what the start says of them at its own size:
    read larger than it has learnt to, it knows less.

    Args:
        state: of a run that goes on, which holds it.
    """
    if grounding is None or not grounding.stay:
        return None
    if number == 0 and context.recipe.model.image_size is not None and not context.start.new:
        with torch.random.fork_rng():  # it seeds what it draws
            before = start_of(context.recipe, image_size=None, trust_import=context.trust_import)[0]
    else:
        before = copy.deepcopy(model)
    before.heads = None
    if state is not None:
        before.load_state_dict(state["before"])
    return before.to(model.device, model.dtype).eval().requires_grad_(False)


class GroundStep(GradientStep):
    """The gradient of a batch of pictures with their phrases and boxes, one micro-batch after the other.

    Args:
        before: the model as it was, which features are to stay near.
        stay: weight of that.
    """

    def __init__(self, *arguments: Any, before: DualEncoder | None = None, stay: float = 0.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.before, self.stay = before, stay

    def __call__(self, batch: dict[str, Any]) -> LossOutput:
        size = len(batch["image_keys"])
        micro = min(self.micro_batch_size or size, size)
        names = ("focal", "distance", "overlap", "inside", *(["stay"] if self.before is not None else []))
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.model.logit_scale.device)
        exchange = self.sharding.mean_gradients(self.model.parameters())
        for start in range(0, size - micro, micro):
            sums += self._backward(batch, slice(start, start + micro), size)
        with exchange:  # of the gradients of all micro-batches, while the last one's come
            sums += self._backward(batch, slice((size - 1) // micro * micro, size), size)
        sums = sum_over_ranks(sums) / world_size()
        *parts, accuracy = sums
        self.parts = dict(zip(names, parts, strict=True))
        return LossOutput(sums[:-1].sum().float(), accuracy.float())

    def _backward(self, batch: dict[str, Any], rows: slice, size: int) -> torch.Tensor:
        """Add the gradient of these pictures; returns what is told of them, shares of the batch's means: parts of the loss, and accuracy."""
        device = self.model.logit_scale.device
        pictures = {name: to_device(batch[name][rows], device) for name in _OF_PICTURES}
        own = _used(batch["asked"][rows])
        ids, mask = (to_device(batch[name][own], device) for name in ("input_ids", "attention_mask"))
        drawn, drawn_mask = (to_device(batch[f"drawn_{name}"], device) for name in ("ids", "mask"))
        with self.autocast():
            _, phrases = self.model(input_ids=ids, attention_mask=mask)
            others = self.model(input_ids=drawn, attention_mask=drawn_mask)[1] if len(drawn) else phrases[:0]
            pixels = self.augment(pictures["pixels"])
            tokens = self.model.image_tokens(pixels)
            regions = self.model.heads(tokens)
        place = torch.full((len(batch["numbers"]),), -1)
        place[own] = torch.arange(len(own))
        asked = batch["asked"][rows]
        own_place = to_device(torch.where(asked >= 0, place[asked], -1), device)
        # A drawn phrase that is a picture's own is asked once.
        said = torch.where(asked >= 0, batch["numbers"][asked.clamp(min=0)], -1)
        foreign = to_device((said[:, :, None] != batch["drawn"]).all(1), device)
        with torch.autocast(device.type, enabled=False):
            found = _asked(regions, phrases, others, own_place, foreign, pictures)
        scores, targets = found
        matched = match(scores, regions.boxes, regions.real, targets)
        parts = losses(scores, regions.boxes, targets, matched)
        each = [*parts, inside(regions.boxes, regions.places, regions.real, targets)]
        if self.before is not None:
            with self.autocast():
                images = F.normalize(_whole(self.model.image_tower.project(tokens.pooled)), dim=1)
                with torch.no_grad():
                    seen = self.before.image_tower.preprocessing.shape[-2:]
                    were = self.before.image_features(at_size(pixels, seen) if pixels.ndim == 4 else pixels)
                    said_before = self.before.text_features(ids, mask)
            each.append(self.stay * _moved(images, were, phrases, said_before, own_place))
        self.backward(torch.stack([part.sum() for part in each]).sum() / size)
        told = [part.detach().double().sum() for part in each]
        told.append(_found(scores.detach(), regions.boxes.detach(), targets).sum())
        return torch.stack(told) / size


def _whole(features: torch.Tensor) -> torch.Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _moved(
    images: torch.Tensor, were: torch.Tensor, phrases: torch.Tensor, said_before: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Half the squared distances of every picture and, on the mean, of its phrases from what they were, ``[n]``."""
    apart = (phrases - said_before).square().sum(1)
    real = own >= 0
    of_phrases = (apart[own.clamp(min=0)] * real).sum(1) / real.sum(1).clamp(min=1)
    return ((images - were).square().sum(1) + of_phrases) / 2


def _used(asked: torch.Tensor) -> torch.Tensor:
    """Places of the phrases that these pictures are asked."""
    found = asked.unique()
    return found[found >= 0]


def _asked(
    regions: Regions,
    phrases: torch.Tensor,
    others: torch.Tensor,
    own: torch.Tensor,
    foreign: torch.Tensor,
    pictures: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, Targets]:
    """Scores ``[n, p, k + m]`` of own phrases and the drawn ones, and what is right of them.

    Args:
        own: int64 ``[n, k]``, rows of `phrases`, −1 for none.
        foreign: bool ``[n, m]``, whether a drawn phrase is none of a picture's own.
    """
    dtype = regions.features.dtype
    scores = torch.cat([regions.scores(phrases[own.clamp(min=0)].to(dtype)), regions.scores(others.to(dtype))], dim=2)
    says = pictures["says"]
    nothing = says.new_zeros(*says.shape[:2], others.shape[0])
    return scores, Targets(
        pictures["boxes"].to(dtype),
        pictures["counts"],
        torch.cat([says, nothing], dim=2),
        torch.cat([own >= 0, foreign], dim=1),
    )


def _found(scores: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Of every picture the share of its phrases whose best region lies on one of their boxes, ``[n]``."""
    phrases = targets.says.any(1)
    best = scores.argmax(1)
    chosen = corners(boxes.gather(1, best[..., None].expand(-1, -1, 4)))
    overlap = iou(chosen[:, None], corners(targets.boxes)[:, :, None])
    hit = ((overlap >= _HIT) & targets.says).any(1) & phrases
    return hit.sum(1).double() / phrases.sum(1).clamp(min=1)
