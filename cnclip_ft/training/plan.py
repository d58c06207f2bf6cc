"""What will happen, said before it does: weights, what trains, steps, rates, duplicates, precision, warnings."""

from __future__ import annotations

import numpy as np
import torch

from cnclip_ft.data.mixture import Mixture
from cnclip_ft.data.permutation import RUNS, run_length
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.advice import warnings
from cnclip_ft.training.context import Context, shard_notes
from cnclip_ft.training.lora import trained_size
from cnclip_ft.training.memory import estimate
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.throughput import Throughput, card
from data_tools.words import Said, joined, labelled, many

BARS = "▁▂▃▄▅▆▇█"


def describe(context: Context, model: DualEncoder, stages: list[StagePlan]) -> Said:
    """The whole plan as text, warnings last."""
    lines: list[str] = [
        Said("Plan", "训练计划"),
        _line("run folder", "运行目录", str(context.folder)),
        _line("device", "设备", _device(context)),
    ]
    known = card(context.device, context.precision)
    if known is not None:
        lines.append(_line("card", "显卡", known.in_words))
    reason = Said(
        "{precision} ({why})", "{precision}（{why}）", precision=context.precision, why=context.precision_reason
    )
    if context.recipe.fp8:
        reason = Said("{reason}, products of the layers in 8 bits", "{reason}，各层的矩阵乘为 8 位", reason=reason)
    lines.append(_line("precision", "精度", reason))
    lines.append(_line("attention", "注意力", attention_kernel(context.device, context.precision)))
    lines.append(_line("decoding", "解码", _decoding(context)))
    lines.append(Said("  weights", "  权重"))
    lines += [joined(["    ", line], "") for line in context.start.lines()]
    lines.append(_line("training", "训练", _training(context)))
    lines += _captions(context) + _order(context) + _mixture(context, stages)
    for name, evaluator in context.evaluators.items():
        lines.append(
            _line("validation", "验证", Said("{name}: {what}", "{name}：{what}", name=name, what=evaluator.describe()))
        )
    guard = context.recipe.data.guard
    if guard is not None:
        then = Said("is reported", "会报告") if guard.action == "report" else Said("ends the run", "会结束运行")
        store = context.guard_store
        what = next(iter(context.evaluators))
        if store is not None:
            what = Said(
                "{pairs:,} pairs ({place})", "{pairs:,} 个图文对（{place}）", pairs=len(store), place=store.path
            )
        alone = Said(", {language} by itself", "，只看 {language}", language=guard.language) if guard.language else ""
        said = Said(
            "{what}{alone}; a drop of more than {drop:g} points {then}",
            "{what}{alone}；下降超过 {drop:g} 个百分点{then}",
            what=what,
            alone=alone,
            drop=guard.max_drop,
            then=then,
        )
        lines.append(_line("guard", "防遗忘", said))
    if context.recipe.best_by != "mean_recall":
        lines.append(_line("best by", "最佳依据", context.recipe.best_by))
    if context.recipe.chosen:
        earlier = Said(
            "  chosen when the run began; what was given since counts", "  本次运行开始时自动选择；之后给出的设置优先"
        )
        lines.append(earlier if context.goes_on else Said("  chosen", "  自动选择"))
        lines += [joined(["    ", line], "") for line in context.recipe.chosen]
    for stage in stages:
        lines += _stage(context, model, stage)
    lines += [_line("shards", "分片", note) for note in shard_notes(context)]
    lines += [_line("WARNING", "警告", warning) for warning in warnings(context, model, stages)]
    return joined(lines)


def _line(label: str, label_zh: str, said: str) -> Said:
    return labelled(Said(f"  {label}", f"  {label_zh}"), 15, said)


def _stores(context: Context) -> str:
    store = context.train_store
    if isinstance(store, Mixture):
        if context.recipe.data.batches == "by_store":
            return Said(
                "{count} stores, batches of one each", "{count} 个数据仓，每批只来自其中一个", count=len(store.parts)
            )
        return Said("{count} stores, batches mixed", "{count} 个数据仓，批次混合", count=len(store.parts))
    return str(store.path)


def _captions(context: Context) -> list[str]:
    """What an epoch is where it draws one caption a picture."""
    table, data = context.pairs, context.recipe.data
    if table.weights is None:
        return []
    several = np.unique(table.image_keys, return_counts=True)[1]
    how: str = Said("each as likely", "机会均等")
    named = ", ".join(f"{language} {weight:g}" for language, weight in (data.caption_languages or {}).items())
    low, high = table.weights.min(), table.weights.max()
    if data.captions == "weighted" and named:
        how = Said(
            "by weights times those of languages ({named}), {low:g} to {high:g}",
            "按权重乘以语言的倍数（{named}），为 {low:g} 到 {high:g}",
            named=named,
            low=low,
            high=high,
        )
    elif data.captions == "weighted":
        how = Said("by weights of {low:g} to {high:g}", "按 {low:g} 到 {high:g} 的权重", low=low, high=high)
    elif named:
        how = Said("by language ({named})", "按语言（{named}）", named=named)
    return [
        Said(
            "    an epoch visits pictures, each with one of its captions ({mean:.1f} on average), drawn anew, {how}",
            "    每轮逐张访问图片，每张重新抽取一条文本（平均 {mean:.1f} 条），{how}",
            mean=several.mean(),
            how=how,
        )
    ]


def _order(context: Context) -> list[str]:
    """How an epoch is shuffled, where that is not altogether."""
    data = context.recipe.data
    if context.earlier_order:
        return [
            Said(
                "    pairs come in the order that an earlier version drew, as they did when this run began",
                "    图文对按早先版本抽取的顺序出现，与本次运行开始时相同",
            )
        ]
    if data.order == "global":
        return []
    return [
        Said(
            "    an epoch is read in runs of {run:,} pairs that lie behind one another; {window:,} pairs, of {runs} runs, are shuffled among "
            "themselves",
            "    每轮按存放顺序成段读取，每段 {run:,} 个图文对；每 {window:,} 个图文对（来自 {runs} 段）一起打乱",
            run=run_length(len(context.pairs), data.order_window),
            window=min(data.order_window, len(context.pairs)),
            runs=RUNS,
        )
    ]


def _mixture(context: Context, stages: list[StagePlan]) -> list[str]:
    """A line for every store of a mixture, what of an epoch is its, and the languages of the texts."""
    spans, visits = context.pairs.spans, stages[0].order.visits
    shares = visits.counts if visits.weighted and stages[0].apart is None else [len(span) for span in spans]
    lines: list[str] = [
        Said(
            "    {name}: {pairs:,} pairs, weight {weight:g}, {share:.1f}% of an epoch",
            "    {name}：{pairs:,} 个图文对，权重 {weight:g}，占一轮的 {share:.1f}%",
            name=span.name,
            pairs=len(span),
            weight=span.weight,
            share=100 * share / sum(shares),
        )
        for span, share in zip(spans, shares, strict=True)
    ]
    told = [
        Said("{name} {count:,}", "{name} {count:,}", name=name or Said("not said", "未注明"), count=count)
        for name, count in context.pairs.languages.most_common()
    ]
    if len(told) > 1:
        lines.append(Said("    languages: {told}", "    语言：{told}", told=joined(told, ", ", "，")))
        if not all(context.pairs.languages):
            lines.append(
                Said(
                    "    of a store whose texts do not say their language, data.train.N.language=zh (or en) says it",
                    "    数据仓的文本未注明语言时，由 data.train.N.language=zh（或 en）说明",
                )
            )
    return lines


def _device(context: Context) -> str:
    count = context.world
    name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    if count == 1:
        return name
    return Said(
        "{count} × {name}, weights {how}",
        "{count} × {name}，权重{how}",
        count=count,
        name=name,
        how=context.sharding.name,
    )


def _decoding(context: Context) -> Said:
    count = context.workers
    workers = Said("1 worker process" if count == 1 else f"{count} worker processes", f"{count} 个工作进程")
    if context.recipe.data.workers == "auto" and context.most_workers > count:
        workers = Said(
            "{workers}, up to {most} where the first steps need them",
            "{workers}，前几步显示需要时最多 {most} 个",
            workers=workers,
            most=context.most_workers,
        )
    if not context.workers:
        workers = Said("the training process", "训练进程")
    named = {"workers": workers, "why": context.decoder_reason}
    if context.decoder is not None:
        return Said(
            "JPEGs on the card by {decoder} ({why}), read by {workers}",
            "JPEG 由 {decoder} 在显卡上解码（{why}），由{workers}读取",
            decoder=context.decoder.name,
            **named,
        )
    if context.device.type == "cuda":
        return Said("by {workers} ({why})", "由{workers}完成（{why}）", **named)
    return Said("by {workers}", "由{workers}完成", workers=workers)


def _training(context: Context) -> Said:
    table = context.pairs
    return Said(
        "{pairs:,} pairs, {images:,} images ({place}); captions {mean:.1f} tokens on average, {cut:.1f}% reach the context length "
        "of {length}",
        "{pairs:,} 个图文对，{images:,} 张图片（{place}）；文本平均 {mean:.1f} token，{cut:.1f}% 达到文本长度上限 {length}",
        pairs=len(table),
        images=table.image_count,
        place=_stores(context),
        mean=table.lengths.mean(),
        cut=100 * table.cut / len(table),
        length=context.tokenizer.context_length,
    )


def attention_kernel(device: torch.device, precision: str) -> Said:
    """Which of PyTorch's attention kernels the towers get, and why that one."""
    if device.type == "cuda":
        enabled = torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device) >= (8, 0)
        if precision == "fp32":
            return Said(
                "memory-efficient kernel of PyTorch's sdpa (flash attention computes in 16 bits, this run in fp32)",
                "PyTorch sdpa 的省显存内核（flash attention 用 16 位计算，本次为 fp32）",
            )
        if not enabled:
            return Said(
                "memory-efficient kernel of PyTorch's sdpa (flash attention needs compute capability 8.0 or more)",
                "PyTorch sdpa 的省显存内核（flash attention 需要计算能力 8.0 或更高）",
            )
        return Said(
            "image tower: flash attention of PyTorch's sdpa ({precision}, no mask); text tower: its memory-efficient kernel "
            "(padded texts need a mask, which flash attention does not take)",
            "图像塔：PyTorch sdpa 的 flash attention（{precision}，无掩码）；文本塔：其省显存内核（补齐的文本需要掩码，flash attention 不支持）",
            precision=precision,
        )
    if device.type == "cpu":
        return Said(
            "flash kernel for CPUs of PyTorch's sdpa (the only fused one there; takes masks)",
            "PyTorch sdpa 的 CPU flash 内核（CPU 上唯一的融合内核；支持掩码）",
        )
    return Said(
        "PyTorch's sdpa on {device} (one kernel there)",
        "{device} 上的 PyTorch sdpa（只有一个内核）",
        device=device.type,
    )


def _stage(context: Context, model: DualEncoder, stage: StagePlan) -> list[str]:
    setting = stage.setting
    lines: list[str] = [Said("  stage {name}", "  阶段 {name}", name=stage.name)]
    for tower in ("image", "text", "temperature", *(["heads"] if stage.grounding is not None else [])):
        entries = [entry for entry in stage.entries if entry.tower == tower]
        trained = sum(map(trained_size, entries))
        every = sum(entry.parameter.numel() for entry in entries)
        rates = sorted({setting.learning_rate * entry.rate for entry in entries if entry.rate})
        how = Said("frozen", "冻结")
        if rates:
            ends = " … ".join(f"{rate:.3g}" for rate in dict.fromkeys((rates[0], rates[-1])))
            how = Said("rate {ends}", "学习率 {ends}", ends=ends)
        ranks = [entry.lora.rank for entry in entries if entry.lora]
        if ranks:
            how = Said(
                "{how}, as low-rank updates of rank {rank}", "{how}，低秩更新，秩 {rank}", how=how, rank=max(ranks)
            )
        said = Said(
            "{trained:,} of {every:,} parameters train ({share:.0f}%), {how}",
            "{every:,} 个参数中训练 {trained:,} 个（{share:.0f}%），{how}",
            trained=trained,
            every=every,
            share=100 * trained / every,
            how=how,
        )
        lines.append(labelled(Said(f"    {tower}", f"    {_TOWERS[tower]}"), 17, said))
    lines.append(_steps(stage))
    if setting.until == "plateau":
        lines.append(
            Said(
                "    ends earlier when {count} validations in a row bring less than {gain:g} points",
                "    若连续 {count} 次验证的提升不到 {gain:g} 个百分点则提前结束",
                count=setting.patience,
                gain=setting.min_gain,
            )
        )
    lines.append(
        Said(
            "    rate {curve}  warm-up {warmup}, then {schedule}",
            "    学习率 {curve}  预热 {warmup}，之后 {schedule}",
            curve=curve(stage),
            warmup=Said(many(stage.curve.warmup, "step"), f"{stage.curve.warmup} 步"),
            schedule=setting.schedule,
        )
    )
    if stage.grounding is not None:
        lines += stage.grounding.describe()
        lines.append(Said("    best by {score}", "    最佳依据 {score}", score=stage.decides))
    elif stage.teaching is None:
        lines += _learning(model, stage)
        if stage.distilling is not None and setting.distill is not None:
            lines += stage.distilling.describe(model.image_tower.output_dim, setting.distill)
        if stage.further is not None:
            lines.append(stage.further.describe())
        if stage.negatives is not None:
            lines += stage.negatives.describe(stage.texts_per_pair)
    elif setting.teach is not None:
        lines += stage.teaching.describe(model.image_tower.output_dim, setting.teach)
    needed = estimate(context, stage, model).in_words
    lines.append(Said("    memory per device {needed}", "    每个设备的内存 {needed}", needed=needed))
    throughput = Throughput.of(context, stage, model)
    if throughput is not None:
        foretold = throughput.foretold(stage.total * setting.batch_size)
        lines.append(labelled(Said("    throughput", "    吞吐"), 17, foretold))
    return lines


def _learning(model: DualEncoder, stage: StagePlan) -> list[str]:
    """What a stage on pictures makes small, and whether it walks the image tower."""
    setting, order = stage.setting, stage.order
    lines: list[str] = []
    lines.append(
        Said(
            "    {kind} objective{whose}; other pairs with the same image or text: {positives} ({expected:.2f} expected per pair in a "
            "random batch, {left:.2f} left per ordered batch)",
            "    目标函数 {kind}{whose}；图片或文本相同的其他图文对：{positives}（随机批量中每对预计遇到 {expected:.2f} 个，编排后每批剩 {left:.2f} 个）",
            kind=stage.objective.kind,
            whose=_whose(model, stage),
            positives=setting.objective.positives,
            expected=order.expected_repeats(),
            left=order.repeats_per_batch(),
        )
    )
    if stage.objective.dimensions:
        lines.append(
            Said(
                "    learnt for features cut to {widths} numbers as well",
                "    同时学习截短到 {widths} 维的特征",
                widths=", ".join(map(str, stage.objective.dimensions)),
            )
        )
    if setting.augment.size not in (None, model.image_size):
        lines.append(
            Said(
                "    learns from crops of {side} × {side}, is judged by pictures of {size} × {size}",
                "    用 {side} × {side} 的裁剪训练，用 {size} × {size} 的图片验证",
                side=setting.augment.size,
                size=model.image_size,
            )
        )
    if stage.image_frozen:
        once = Said("computed every step", "每步都算")
        if stage.cached:
            once = Said(
                f"computed once ({{views}} view{'s' * (setting.views > 1)})",
                "只算一次（{views} 个视图）",
                views=setting.views,
            )
        lines.append(Said("    image tower frozen: its features are {once}", "    图像塔冻结：其特征{once}", once=once))
    if stage.texts_kept:
        lines.append(Said("    text tower frozen: its features are computed once", "    文本塔冻结：其特征只算一次"))
    return lines


_TOWERS = {"image": "图像塔", "text": "文本塔", "temperature": "温度", "heads": "检测头"}


def _steps(stage: StagePlan) -> Said:
    setting, each = stage.setting, stage.order.steps_per_epoch
    size = setting.micro_batch_size
    micro: str = Said(" in micro-batches of {size}", "，分成 {size} 的小批", size=size) if size else ""
    if size == "auto":
        micro = Said(
            " (split into micro-batches where it does not fit; their size is found when the stage begins)",
            "（放不下时拆成小批，大小在阶段开始时确定）",
        )
    judged: str = Said("validation every {every} steps", "每 {every} 步验证一次", every=stage.validate_every)
    if stage.validate_every >= stage.total:
        judged = Said("validation at the end", "结束时验证一次")
    return Said(
        "    {total} steps = {epochs:.1f} epochs of {each} steps, global batch {batch}{micro}, {judged}",
        "    {total} 步 = {epochs:.1f} 轮，每轮 {each} 步，总批量 {batch}{micro}，{judged}",
        total=stage.total,
        epochs=stage.total / each,
        each=each,
        batch=setting.batch_size,
        micro=micro,
        judged=judged,
    )


def _whose(model: DualEncoder, stage: StagePlan) -> str:
    """What is to be said of the loss beside its name."""
    if model.logit_bias is None:
        return ""
    if stage.objective.biased:
        own = Said("the model's own, ", "模型自己的，") if stage.setting.objective.kind is None else ""
        return Said(" ({own}with its temperature and bias as they are)", "（{own}温度与偏置照旧）", own=own)
    return Said(
        " (a softmax does not see the model's logit_bias: it stays as it is, and does not train)",
        "（softmax 不看模型的 logit_bias：它保持原样，不参与训练）",
    )


def curve(stage: StagePlan, width: int = 32) -> str:
    """The rate over the stage as one line of bars."""
    steps = [int(column * (stage.total - 1) / max(width - 1, 1)) for column in range(min(width, stage.total))]
    return "".join(BARS[min(7, int(stage.curve(step) * 7.999))] for step in steps)
