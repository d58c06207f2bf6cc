"""What is likely to go wrong in a run, said before it begins, each with what to give instead."""

from __future__ import annotations

import math
from itertools import islice

from cnclip_ft.data.mixture import stores_of
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.imported import is_convolutional
from cnclip_ft.recipe_rates import far_rate, joining_rate, suggested_rate
from cnclip_ft.recipe_sizes import batch_of_data
from cnclip_ft.training.context import Context
from cnclip_ft.training.memory import estimate
from cnclip_ft.training.stage_plan import StagePlan
from data_tools.errors import RequestError
from data_tools.words import Said

_FEW = 16  # pairs that a batch should have, however few pictures there are


def warnings(context: Context, model: DualEncoder, stages: list[StagePlan]) -> list[str]:
    """What is likely to go wrong, each with a suggestion."""
    found: list[str] = []
    for stage in stages:
        setting, name = stage.setting, stage.name
        # The published rates are of contrastive training; pictures with boxes are not compared with each other.
        pretrained_image = not stage.image_frozen and not any(part == "image_tower" for part in context.new_parts)
        pretrained_image &= stage.grounding is None
        advised = suggested_rate(setting.batch_size)
        if is_convolutional(model.image_tower):  # what learnt from labels has a long way to go, in a second run too
            advised = max(advised, far_rate(setting.batch_size))
        elif context.new_parts:  # towers that had not met know less of each other to lose
            advised = max(advised, joining_rate(setting.batch_size))
        # The image tower's own: a new text tower may be far faster.
        factor = max((e.rate for e in stage.entries if e.tower == "image" and not e.projection), default=1.0)
        if pretrained_image and setting.learning_rate * factor > 2 * advised:
            found.append(
                Said(
                    "{name}: rate {rate:g} is high for a global batch of {batch} and may destroy what the model knows; published "
                    "pairs of batch and rate suggest about stages.{name}.learning_rate={advised:.1e}",
                    "{name}：总批量为 {batch} 时学习率 {rate:g} 偏高，可能毁掉模型已学到的；按已发表的批量与学习率，"
                    "建议约 stages.{name}.learning_rate={advised:.1e}",
                    name=name,
                    rate=setting.learning_rate * factor,
                    batch=setting.batch_size,
                    advised=advised / factor,
                )
            )
        if (
            setting.batch_size < _FEW
            and stage.grounding is None
            and setting.batch_size < (least := _least_batch(context, stage))
        ):
            found.append(
                Said(
                    "{name}: batch {batch} leaves few negatives; give stages.{name}.batch_size={least} or more "
                    "(stages.{name}.micro_batch_size=auto splits it if it does not fit)",
                    "{name}：批量 {batch} 的负例太少；请设 stages.{name}.batch_size={least} 或更大"
                    "（放不下时 stages.{name}.micro_batch_size=auto 会把它拆开）",
                    name=name,
                    batch=setting.batch_size,
                    least=least,
                )
            )
        if crowded := _crowded(context, stage):
            found.append(crowded)
        if stage.further is not None and stage.further.count > stage.further.most:
            found.append(
                Said(
                    "{name}: no picture has {count} captions, so a step shows some of them several times; give "
                    "stages.{name}.captions_at_once={most}",
                    "{name}：没有图片有 {count} 条文本，一步中有些会重复出现；请设 stages.{name}.captions_at_once={most}",
                    name=name,
                    count=stage.further.count,
                    most=stage.further.most,
                )
            )
        if stage.total < 50:
            found.append(
                Said(
                    "{name}: only {steps} steps; {longer}",
                    "{name}：只有 {steps} 步；{longer}",
                    name=name,
                    steps=stage.total,
                    longer=_longer(stage),
                )
            )
        if context.device.type == "cpu" and (short := estimate(context, stage, model).shortage(name)):
            found.append(short)
    if context.recipe.fp8 and not context.recipe.compile:
        found.append(
            Said(
                "fp8 without compile takes longer than bf16: rounding is a pass of its own then; give compile=layers",
                "不编译时 fp8 比 bf16 更慢：舍入要单独走一遍数据；请设 compile=layers",
            )
        )
    leak = _leak(context)
    if leak:
        found.append(leak)
    return found


def _crowded(context: Context, stage: StagePlan) -> str | None:
    """Where a batch has more pairs than there are pictures; up to `_FEW` pairs that is how it has to be."""
    size = stage.setting.batch_size
    if stage.grounding is not None or stage.teaching is not None or size <= _FEW or size > len(context.pairs):
        return None
    images = context.pairs.image_count
    less = max(2 ** int(math.log2(images)), _FEW)
    less += -less % context.world
    if images >= size or less >= size:
        return None
    return Said(
        "{name}: {again:,} of the {batch:,} pairs of a batch, or more, show a picture that it has already (there are {images:,}), and teach little "
        "for their time. Give stages.{name}.batch_size={less}",
        "{name}：一个批量的 {batch:,} 对中至少有 {again:,} 对的图片是批内已有的（共 {images:,} 张），费时而所学不多。请设 stages.{name}.batch_size={less}",
        name=stage.name,
        again=size - images,
        batch=size,
        images=images,
        less=less,
    )


def _least_batch(context: Context, stage: StagePlan) -> int:
    """What a batch should have at least: `_FEW`, or what `own-data` would choose where there are too few pairs for that."""
    table = stage.apart or context.pairs
    images = table.image_count
    few = batch_of_data(
        len(table) if table.weights is None else images, images
    )  # with weights an epoch visits pictures
    return min(_FEW, 2 ** int(math.log2(few)))


def _longer(stage: StagePlan) -> str:
    """What makes 100 steps of it, to type."""
    setting, key = stage.setting, f"stages.{stage.name}"
    if setting.epochs is None:
        return Said("give more, {key}.steps=100", "请多给一些，{key}.steps=100", key=key)
    return Said(
        "give more epochs, {key}.epochs={epochs}, or a smaller {key}.batch_size=N",
        "请多给几轮，{key}.epochs={epochs}，或减小 {key}.batch_size=N",
        key=key,
        epochs=-(-100 // stage.order.steps_per_epoch),
    )


def _leak(context: Context) -> str | None:
    """Images of the validation split that are in the training split too, by id and by content."""
    for trained in stores_of(context.train_store):
        for name, store in context.valid_stores.items():
            if store.path.resolve() == trained.path.resolve():
                return Said(
                    "{name} is the training split itself: recall will look far better than it is",
                    "{name} 就是训练划分本身：召回率会比实际好看得多",
                    name=name,
                )
            shared = islice((image_id for image_id in store.image_ids if image_id in trained), 500)
            same = [i for i in shared if store.image(i) == trained.image(i)]
            if same:
                return Said(
                    "{name} shares images with the training split (e.g. id {image_id!r}): recall will look better than it is",
                    "{name} 与训练划分有相同的图片（如编号 {image_id!r}）：召回率会比实际好看",
                    name=name,
                    image_id=same[0],
                )
    return None


def refuse_warnings(context: Context, model: DualEncoder, stages: list[StagePlan]) -> None:
    """With --strict a warning is an error."""
    found = warnings(context, model, stages)
    if found:
        raise RequestError("--strict: the plan has warnings:\n  " + "\n  ".join(found))
