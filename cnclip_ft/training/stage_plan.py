"""A stage before its first step, as data: what trains, in which order, for how long, how fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pkgutil import resolve_name

from cnclip_ft.data.batching import BatchOrder, StageSampler
from cnclip_ft.data.earlier_order import EarlierOrder
from cnclip_ft.data.further_captions import FurtherCaptions
from cnclip_ft.data.negatives import NegativeTexts
from cnclip_ft.data.pairs import PairTable
from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_stage import OBJECTIVES
from cnclip_ft.training.context import Context
from cnclip_ft.training.distilling import Distilling, plan_distilling
from cnclip_ft.training.grounding import Boxes, Grounding, plan_grounding
from cnclip_ft.training.large_batch import batch_norm_refusal, batch_norms
from cnclip_ft.training.lora import check_lora
from cnclip_ft.training.loss import Aim, Objective
from cnclip_ft.training.optimizer import Entry, RateCurve, rules_for, training_table
from cnclip_ft.training.sharding import refuse_with_sharding
from cnclip_ft.training.teaching import Teaching, TeachObjective, plan_teaching
from data_tools.errors import RequestError

MOST_STEPS = 10**7 - 1  # of a stage: states are named by stage and step
MOST_TEXTS = 2_000_000  # pairs whose features of texts are kept: the texts lie in memory until they are computed


@dataclass(frozen=True)
class StagePlan:
    """What is known of a stage before it is trained.

    `entries` say of every parameter, by its name, whether and how fast it trains; `validate_every` and `keep_every` count steps;
    `objective` goes by the model the run starts with where the recipe leaves it open.
    """

    number: int
    name: str
    setting: Stage
    objective: Aim
    entries: tuple[Entry, ...]
    order: BatchOrder
    total: int
    curve: RateCurve
    validate_every: int
    keep_every: int | None  # steps between checkpoints that stay
    image_frozen: bool  # the trunk; its projection may train
    cached: bool  # the frozen trunk's features are computed once
    share: int  # pairs of a batch on each device
    teaching: Teaching | None = None  # of a stage that learns from a teacher, rows of text instead of pairs
    distilling: Distilling | None = None  # of a stage that has a teacher beside its pairs
    negatives: NegativeTexts | None = None  # of a stage that shows texts beside the pairs which are not true
    further: FurtherCaptions | None = None  # of a stage that shows several captions of a picture at once
    grounding: Grounding | None = None  # of a stage that learns boxes, pictures with boxes instead of pairs
    texts_kept: bool = False  # nothing of the text tower trains, and its features are computed once
    decides: str = "mean_recall"  # the score by which its best is chosen

    @property
    def texts_per_pair(self) -> int:
        """Texts of a pair that go through the text tower: in all languages of a teaching stage, all captions shown at once with the
        hard negatives, or about as many
        phrases as a picture with boxes has, without those that all pictures of a step are asked."""
        if self.teaching is not None:
            return len(self.teaching.languages)
        if self.grounding is not None:
            return -(-len(self.grounding.table.said) // len(self.grounding.table))
        return self.setting.captions_at_once + (0 if self.negatives is None else self.negatives.setting.count)

    @property
    def checkpointing(self) -> dict[str, bool]:
        """Which towers compute their activations again in the backward."""
        wanted = self.setting.gradient_checkpointing
        return {"image": wanted in ("image", "both") and not self.image_frozen, "text": wanted in ("text", "both")}

    def without_images(self, context: Context, keys: set[int]) -> StagePlan:
        """The stage without the pairs of images that cannot be read. As many steps, epochs may be shorter."""
        order = _order(context, self.number, self.name, self.setting, grounding=self.grounding, without_images=keys)
        return replace(self, order=order)

    def logged(self, step: int, every: int) -> bool:
        """Whether a line is written when this many steps are done, where every `every`-th has one."""
        return step % every == 0 or step == self.total

    @property
    def apart(self) -> PairTable | None:
        """What it learns from instead of the run's pairs."""
        if self.teaching is not None:
            return self.teaching.table
        return None if self.grounding is None else self.grounding.table


def plan_stage(context: Context, model: DualEncoder, number: int, name: str, setting: Stage) -> StagePlan:
    """Look at all a stage needs, before anything is trained.

    Raises:
        RequestError: a setting that cannot work with this model, data or number of devices.
    """
    teaching = None if setting.teach is None else plan_teaching(context, name, setting.teach)
    objective = make_objective(name, setting, biased=model.logit_bias is not None)
    grounding = plan_grounding(context, model, name, setting)
    entries = training_table(
        model, objective, rules_for(setting, context.new_parts), None if grounding is None else grounding.heads
    )
    if grounding is not None:
        entries = [replace(entry, rate=0.0) if entry.tower == "temperature" else entry for entry in entries]
    if teaching is not None:
        entries = _text_alone(name, entries)
        _refuse_other_space(name, setting, teaching, model)
    check_lora(model, entries)
    refuse_with_sharding(
        context.sharding,
        name,
        precision=context.precision,
        lora=any(e.lora for e in entries),
        micro_batch_size=setting.micro_batch_size,
    )
    order = _order(context, number, name, setting, teaching, grounding)
    StageSampler(order, 0, 0, context.rank, context.world)  # the batch can be shared
    total = _total(setting, order)
    if total > MOST_STEPS:
        raise RequestError(
            f"stages.{name}: {total} steps; at most {MOST_STEPS} are possible. Give stages.{name}.epochs=N, fewer."
        )
    if setting.warmup_steps is not None and setting.warmup_steps >= total:
        raise RequestError(
            f"stages.{name}: warmup_steps ({setting.warmup_steps}) must be shorter than the stage ({total} steps). "
            f"Give stages.{name}.warmup_steps={total // 10}, or train longer."
        )
    if setting.patch_dropout and model.image_tower.patch_dropout is None:
        raise RequestError(
            f"stages.{name}: patch_dropout is set, but this image tower has no patches to drop: "
            f"stages.{name}.patch_dropout=0"
        )
    if setting.augment.changes and len(model.image_tower.preprocessing.shape) != 3:
        raise RequestError(
            f"stages.{name}: augment is for pictures of one size, and this image tower takes each in its own shape: stages.{name}.augment={{}}"
        )
    _refuse_size(name, setting.augment.size, model.image_tower)
    _refuse_widths(name, setting, model)
    _refuse_batch_norm(name, setting, setting.batch_size // context.world, model, entries)
    image_frozen = not trunk_trains(entries, "image")
    if not image_frozen and setting.batch_norm == "train":
        _refuse_statistics_apart(context, name, model)
    kept = setting.feature_cache and (setting.views > 1 or not setting.augment.changes)
    cached = teaching is None and grounding is None and image_frozen and kept
    return StagePlan(
        number=number,
        name=name,
        setting=setting,
        objective=objective,
        entries=tuple(entries),
        order=order,
        total=total,
        curve=RateCurve(setting, total),
        validate_every=setting.validate_every or order.steps_per_epoch,
        keep_every=setting.keep_every and setting.keep_every * order.steps_per_epoch,
        image_frozen=image_frozen,
        cached=cached,
        share=setting.batch_size // context.world,
        teaching=teaching,
        distilling=plan_distilling(context, name, setting, cached=cached),
        negatives=_negatives(context, number, name, setting),
        further=_further(context, number, name, setting),
        grounding=grounding,
        texts_kept=_texts_kept(context, setting, entries, total),
        decides=context.recipe.decides(name),
    )


def _texts_kept(context: Context, setting: Stage, entries: Iterable[Entry], total: int) -> bool:
    """Whether features of texts are computed before the first step: a frozen tower would say the same of each several times.

    Hard negatives are drawn and made in the step itself, so a stage that has some reads all texts there.
    """
    other = setting.teach is not None or setting.ground is not None or setting.negatives is not None
    if other or not setting.feature_cache or any(e.rate for e in entries if e.tower == "text"):
        return False
    return len(context.pairs) <= min(MOST_TEXTS, total * setting.batch_size * setting.captions_at_once)


def _further(context: Context, number: int, name: str, setting: Stage) -> FurtherCaptions | None:
    if setting.captions_at_once == 1:
        return None
    seed, key = context.recipe.seed * 1000 + number, f"stages.{name}.captions_at_once"
    return FurtherCaptions(context.pairs, setting.captions_at_once, seed, key)


def _negatives(context: Context, number: int, name: str, setting: Stage) -> NegativeTexts | None:
    if setting.negatives is None:
        return None
    seed, key = context.recipe.seed * 1000 + number, f"stages.{name}.negatives"
    return NegativeTexts(context.train_store, context.pairs, context.tokenizer, setting.negatives, seed, key)


def _refuse_statistics_apart(context: Context, name: str, model: DualEncoder) -> None:
    """Refuse batch normalisation of each process by its own part of the batch: other numbers than one device's, and statistics that
    differ from process to process. GPUs share theirs."""
    if context.world == 1 or context.device.type == "cuda":
        return
    for place, _ in batch_norms(model.image_tower):
        raise RequestError(
            f"stages.{name}: the image tower normalises by the statistics of a batch ({place}), which {context.world} processes share on "
            f"GPUs alone, and this run is on {context.device.type}. Give stages.{name}.batch_norm=frozen, or train in one process"
        )


def _refuse_other_space(name: str, setting: Stage, teaching: Teaching, model: DualEncoder) -> None:
    width, dim = teaching.teacher.width, model.image_tower.output_dim
    if width != dim and setting.teach is not None and setting.teach.keep == "best":
        raise RequestError(
            f"stages.{name}.teach.teacher: {teaching.teacher.place} is {width} wide and the model {dim}: the pictures do not lie in its space, so "
            f"recall cannot say which weights are the best. Give stages.{name}.teach.keep=last, and a stage on pictures behind it"
        )


def _refuse_size(name: str, size: int | None, tower: ImageTower) -> None:
    """Of the crops that training sees; each of their pixels is made of four of the picture's, too few for less than half its side."""
    key = f"stages.{name}.augment.size"
    if size is not None and not tower.any_size:
        raise RequestError(
            f"{key} is {size}, but this image tower takes pictures of {tower.image_size} alone: {key}=null"
            + (f" (stages.{name}.patch_dropout=0.5 makes its steps shorter)" if tower.patch_dropout is not None else "")
            + (
                ", or any_size = True in its module (docs/towers.md#your-own-image-tower-by-import-path)"
                if tower.kind == "foreign"
                else ""
            )
        )
    if size is not None and not tower.image_size / 2 <= size <= tower.image_size:
        raise RequestError(
            f"{key} is {size}; it may be {-(-tower.image_size // 2)} to {tower.image_size}, from half of the model's pictures to their own side"
        )


def _refuse_widths(name: str, setting: Stage, model: DualEncoder) -> None:
    widths, dim, key = (
        setting.objective.dimensions or [],
        model.image_tower.output_dim,
        f"stages.{name}.objective.dimensions",
    )
    if any(width >= dim for width in widths) or len(set(widths)) < len(widths):
        kept = sorted({width for width in widths if width < dim}, reverse=True)
        raise RequestError(
            f"{key} is {widths}, but features have {dim} numbers: each width once, and below that (whole features are always learnt): "
            f"{key}={kept or [max(dim // 2, 1)]}"
        )


def _refuse_batch_norm(name: str, setting: Stage, share: int, model: DualEncoder, entries: list[Entry]) -> None:
    """Where micro-batches would have statistics of their own; how many ``auto`` makes is not known before the stage begins."""
    wanted = setting.micro_batch_size
    if setting.batch_norm == "frozen" or not isinstance(wanted, int) or wanted >= share:
        return
    for half, tower in (("image", model.image_tower), ("text", model.text_tower)):
        found = batch_norms(tower)
        if found and trunk_trains(entries, half):
            raise batch_norm_refusal(name, f"{half}_tower.{found[0][0]}")


def _text_alone(name: str, entries: list[Entry]) -> list[Entry]:
    """The table of a teaching stage: the temperature, which is for pictures, stays as it is, and so must the image tower."""
    trained = [entry for entry in entries if entry.rate and entry.tower == "image" and not entry.projection]
    if trained:
        raise RequestError(
            f"stages.{name}: a teaching stage sees no pictures, so the image tower cannot train ({trained[0].name} would). "
            f"Give stages.{name}.train=text, or stages.{name}.train.N.rate=0 for its rules"
        )
    return [entry if entry.tower == "text" else replace(entry, rate=0.0) for entry in entries]


def _total(setting: Stage, order: BatchOrder) -> int:
    return setting.steps or max(1, round((setting.epochs or 0) * order.steps_per_epoch))


def longer(plan: StagePlan, before: Stage, step: int) -> str:
    """What becomes of the rate where a stage that was to end as `before` says goes on from `step` to another end."""
    total = _total(before, plan.order)
    rate, now = (
        setting.learning_rate * curve(min(at, curve.total - 1))
        for setting, curve, at in ((before, RateCurve(before, total), step - 1), (plan.setting, plan.curve, step))
    )
    return (
        f"Stage {plan.name} goes on from step {step} to {plan.total}; it was to end at {total}. Its rate follows the "
        f"{plan.setting.schedule} curve of {plan.total} steps: {now:.2e} in the next step, after {rate:.2e} in the last one."
    )


def plan_stages(context: Context, model: DualEncoder) -> list[StagePlan]:
    """All stages of the recipe: what cannot work in a later one is refused before the first one trains."""
    return [
        plan_stage(context, model, number, name, setting)
        for number, (name, setting) in enumerate(context.recipe.stages.items())
    ]


def trunk_trains(entries: Iterable[Entry], tower: str) -> bool:
    """Whether anything of the tower before its projection trains."""
    return any(e.rate for e in entries if e.tower == tower and not e.projection)


def make_objective(name: str, setting: Stage, *, biased: bool) -> Aim:
    """The loss of a stage; `biased`: the model brings a bias, as one trained with a sigmoid does.

    Raises:
        RequestError: label smoothing, and the model's own loss has none.
    """
    if setting.ground is not None:
        return Boxes()
    if setting.teach is not None:
        return TeachObjective(meet=setting.teach.meet, between=setting.teach.between)
    wanted = setting.objective
    objective: type[Objective] = resolve_name(OBJECTIVES[wanted.kind or ("sigmoid" if biased else "contrastive")])
    if wanted.label_smoothing and not objective.smooths:
        raise RequestError(
            f"stages.{name}.objective.label_smoothing spreads the target of a softmax, and this model's own loss, a {objective.kind}, "
            f"has none: stages.{name}.objective.label_smoothing=0, or stages.{name}.objective.kind=contrastive"
        )
    return objective.of(wanted)


def _order(
    context: Context,
    number: int,
    name: str,
    setting: Stage,
    teaching: Teaching | None = None,
    grounding: Grounding | None = None,
    without_images: Iterable[int] = (),
) -> BatchOrder:
    table, of = context.pairs, f"the training split {context.train_store.path}"
    if teaching is not None:
        table, of = teaching.table, str(teaching.texts.store.path)
    elif grounding is not None:
        table, of = grounding.table, f"the pictures with boxes of {grounding.store.path}"
    data = context.recipe.data
    return (EarlierOrder if context.earlier_order else BatchOrder)(
        table,
        setting.batch_size,
        seed=context.recipe.seed * 1000 + number,
        length_window=data.length_window,
        name=of,
        without_images=set(without_images),
        key=f"stages.{name}",
        by_store=data.batches == "by_store",
        order_window=data.order_window if data.order == "by_shard" else None,
    )
