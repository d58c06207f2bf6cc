"""What a stage has computed before its first step: features of a frozen image trunk or text tower, and those of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnclip_ft.features.frozen_trunk import FeatureCache
from cnclip_ft.features.pair_teacher import TaughtPairs
from cnclip_ft.features.teacher import TeacherFeatures
from cnclip_ft.features.text_features import PairTexts
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.context import Context
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.stop import Stopped, StopRequest


@dataclass(frozen=True)
class Prepared:
    """`damaged` are the keys of images that cannot be read: their pairs are passed over."""

    cache: FeatureCache | None = None  # of the model's own frozen image trunk
    teacher: TeacherFeatures | None = None  # of a stage that teaches
    taught: TaughtPairs | None = None  # of a stage with a teacher beside its pairs
    texts: PairTexts | None = None  # of the model's own frozen text tower

    @property
    def damaged(self) -> set[int]:
        found = self.cache.damaged if self.cache is not None else set()
        return found | self.taught.damaged if self.taught is not None else found

    def refuse_damage(self) -> None:
        """As `features.rows.Rows.refuse_damage`, of all that is read."""
        texts = None if self.texts is None else self.texts.features
        for kept in (self.cache, self.teacher, self.taught, texts):
            if kept is not None:
                kept.refuse_damage()


def prepare(context: Context, plan: StagePlan, model: DualEncoder, stop: StopRequest | None) -> Prepared:
    """Compute what is missing, shared over all devices; what was computed by an earlier run is read.

    Args:
        model: with the weights the stage begins with, on its device.

    Raises:
        Stopped: so asked; what is computed stays.
        UserError: more pictures than are allowed cannot be read.
    """

    def asked() -> bool:
        return stop is not None and stop.asked_here

    return Prepared(
        _build_cache(context, plan, model, asked) if plan.cached else None,
        _ask_teacher(context, plan, model, asked) if plan.teaching is not None else None,
        _ask_beside(context, plan, model, asked) if plan.distilling is not None else None,
        _read_texts(context, model, asked) if plan.texts_kept else None,
    )


Asked = Callable[[], bool]


def _say(context: Context, what: str, complete: bool, folder: Path) -> None:
    context.journal.say(f"{what}: {'read from' if complete else 'computed once into'} {folder}")


def _build_cache(context: Context, plan: StagePlan, model: DualEncoder, asked: Asked) -> FeatureCache:
    setting, data = plan.setting, context.recipe.data
    cache = FeatureCache(
        context.cache_folder,
        model,
        context.train_store,
        views=setting.views,
        augment=setting.augment,
        precision=context.precision,
        seed=context.recipe.seed,
        reduced=data.reduced_jpegs,
    )
    _say(context, "Image features of the frozen tower", cache.complete, cache.folder)
    if not cache.build(
        context.accelerator,
        context.autocast,
        workers=context.workers,
        max_damaged=data.max_damaged_images,
        asked_to_stop=asked,
    ):
        raise Stopped
    return cache


def _read_texts(context: Context, model: DualEncoder, asked: Asked) -> PairTexts:
    texts = PairTexts(context.cache_folder, model, context.train_store, context.precision)
    features = texts.features
    _say(context, "Text features of the frozen tower", features.complete, features.folder)
    if not texts.build(context.accelerator, context.autocast, asked):
        raise Stopped
    return texts


def _ask_teacher(context: Context, plan: StagePlan, model: DualEncoder, asked: Asked) -> TeacherFeatures:
    teaching, dim = plan.teaching, model.image_tower.output_dim
    assert teaching is not None
    features = TeacherFeatures(context.cache_folder, teaching.teacher, teaching.heard_texts(), dim, context.precision)
    _say(context, "Features of the teacher", features.complete, features.folder)
    if not features.build(context.accelerator, context.autocast, asked):
        raise Stopped
    if teaching.teacher.width != dim:
        context.journal.say(f"  mapped to the student's width, which keeps {100 * features.kept:.1f}% of them")
    return features


def _ask_beside(context: Context, plan: StagePlan, model: DualEncoder, asked: Asked) -> TaughtPairs:
    distilling, setting, data = plan.distilling, plan.setting, context.recipe.data
    assert distilling is not None
    dim = model.image_tower.output_dim
    taught = TaughtPairs(
        context.cache_folder,
        distilling.teacher,
        context.train_store,
        dim,
        views=setting.views if plan.cached else 1,
        augment=None if distilling.live else setting.augment,
        precision=context.precision,
        seed=context.recipe.seed,
        reduced=data.reduced_jpegs,
        autocast=context.autocast,
    )
    _say(context, "Features of the teacher", taught.complete, context.cache_folder)
    if not taught.build(
        context.accelerator, workers=context.workers, max_damaged=data.max_damaged_images, asked_to_stop=asked
    ):
        raise Stopped
    if distilling.teacher.width != dim:
        context.journal.say(f"  mapped to the model's width, which keeps {100 * taught.kept:.1f}% of them")
    return taught
