"""Findings over the steps of a stage: temperature, gradients, how far towers move, waiting for data, spikes."""

from __future__ import annotations

from statistics import median

from cnclip_ft.training.finding import Finding, Rule, key, longer, rate
from cnclip_ft.training.stage_records import StageRecords
from data_tools.words import Said, joined

_LIMIT = 99.5  # of 100, what the temperature is held at (`DualEncoder.clamp_logit_scale_`)
_BELOW = 95.0  # a stage that begins above it is at home there, as published models are
_MOVING = 0.1  # share by which it still changes in the last fifth of a stage
_CLIPPED, _WAIT = 0.5, 0.2  # shares of the steps, of the time
_STILL = 1e-6  # of a tower's norm: no step moves it by as much
_APART = 50.0  # how many times as far as the other one
_WINDOW, _HIGH, _DEVIATIONS = (
    8,
    2.0,
    6.0,
)  # a spike: twice the median of the lines before, six of its deviations above it
_SECONDS = 30.0  # of which the wait is a share
_TRUNKS = {"image_trunk": Said("image tower", "图像塔"), "text_trunk": Said("text tower", "文本塔")}


def temperature_at_limit(stage: StageRecords) -> list[Finding]:
    """It came to its limit in this stage, and stays."""
    scales = [line["logit_scale"] for line in stage.lines if "logit_scale" in line and "logit_bias" not in line]
    if len(scales) < 5 or not stage.about.get("held", True) or scales[0] >= _BELOW:
        return []
    free = [number for number, scale in enumerate(scales) if scale < _LIMIT]
    held = len(scales) - (free[-1] + 1 if free else 0)
    if held < max(3, len(scales) // 10):
        return []
    saw = Said(
        "The temperature is at its limit: logit scale {first:.1f} → 100 for the last {held} of {all} lines (since step {step}).",
        "温度到了极限：logit scale {first:.1f} → 100，最后 {held} 行（共 {all} 行，自第 {step} 步）。",
        first=scales[0],
        held=held,
        all=len(scales),
        step=stage.lines[-held]["step"],
    )
    means = Said(
        "The pairs of a batch are easily told apart, and the loss asks for sharper scores; what is left to learn from is little.",
        "一批之内的图文对很容易分开，损失要求更尖锐的分数；可学的已经不多。",
    )
    batch = stage.setting("batch_size")
    enough = stage.about.get("steps_per_epoch", 2) >= 2  # a batch is not larger than an epoch
    harder = [key(stage, f"batch_size={2 * batch}")] if batch and enough else []
    do = Said(
        "Make batches harder: {harder}, or slow the temperature down: {rate}.",
        "让批次更难：{harder}，或放慢温度：{rate}。",
        harder=joined([*harder, key(stage, "negatives='{count: 2}'")], ", or ", " 或 "),
        rate=rate(stage, 0.2, "temperature"),
    )
    return [Finding("temperature at its limit", stage.name, saw, means, do)]


def temperature_moving(stage: StageRecords) -> list[Finding]:
    """It is still on its way when the stage ends."""
    scales = [line["logit_scale"] for line in stage.lines if "logit_scale" in line]
    if len(scales) < 10 or not stage.finished or scales[-1] >= _LIMIT:
        return []
    before = scales[-1 - len(scales) // 5]
    if abs(scales[-1] / before - 1) < _MOVING:
        return []
    saw = Said(
        "The temperature was still moving when the stage ended: logit scale {first:.1f} → {before:.1f} → {last:.1f} in its last fifth.",
        "阶段结束时温度仍在移动：logit scale {first:.1f} → {before:.1f}，最后五分之一到 {last:.1f}。",
        first=scales[0],
        before=before,
        last=scales[-1],
    )
    means = Said(
        "It began far from where this model's scores are told apart best, and is not there yet.",
        "起点离最能区分这个模型分数的位置很远，还没有到。",
    )
    do = Said(
        "Let it move faster, {rate}, or train longer, {longer}.",
        "让它走得更快 {rate}，或训练更久 {longer}。",
        rate=rate(stage, 2, "temperature"),
        longer=longer(stage),
    )
    return [Finding("temperature moving", stage.name, saw, means, do)]


def clipped(stage: StageRecords) -> list[Finding]:
    """Most gradients are longer than the limit."""
    share, norm, limit = stage.mean("clipped"), stage.mean("gradient_norm"), stage.setting("gradient_clip")
    if share is None or norm is None or not limit or len(stage.lines) < 3 or stage.lines[-1]["step"] < 20:
        return []
    if share <= _CLIPPED:
        return []
    saw = Said(
        "{share:.0%} of the gradients were clipped: their mean norm is {norm:.2g}, gradient_clip {limit:g}.",
        "{share:.0%} 的梯度被裁剪：平均范数 {norm:.2g}，gradient_clip 为 {limit:g}。",
        share=share,
        norm=norm,
        limit=limit,
    )
    means = Said(
        "The limit cuts ordinary steps, not the rare ones it is for: all count alike, whatever they found. AdamW makes up for the length.",
        "限制裁掉的是普通的步，而不是它本该对付的少数步：不论学到什么，每步一样重。长度由 AdamW 补回。",
    )
    do = Said(
        "Raise it above the usual norm: {key}.",
        "把它提到平常的范数之上：{key}。",
        key=key(stage, f"gradient_clip={max(2 * norm, 2 * limit):.2g}"),
    )
    return [Finding("gradients clipped", stage.name, saw, means, do)]


def towers_apart(stage: StageRecords) -> list[Finding]:
    """A trunk that trains and hardly moves, or moves far more than the other."""
    found: list[Finding] = []
    moved: dict[str, float] = {}
    for part, name in _TRUNKS.items():
        updates = stage.series("relative_updates", part)
        if len(updates) < 3:
            continue
        moved[part] = median(updates)
        if max(updates) < _STILL:
            saw = Said(
                "The {name} hardly moves: no step changed it by more than {most:.1e} of its norm.",
                "{name}几乎不动：没有一步的改变超过其范数的 {most:.1e}。",
                name=name,
                most=max(updates),
            )
            means = Said("Its rate is far too low to learn anything.", "学习率太低，学不到东西。")
            do = Said(
                "Give {rate}, or leave it frozen, which costs less.",
                "可设 {rate}，或者干脆冻结，更省。",
                rate=rate(stage, 100, part.partition("_")[0]),
            )
            found.append(Finding(f"{part.partition('_')[0]} tower still", stage.name, saw, means, do))
    if found or len(moved) < 2 or set(stage.about.get("new", ())) & {"image", "text"}:
        return found  # a tower made new moves more, as it should
    slow, fast = sorted(moved, key=moved.__getitem__)
    if moved[fast] > _APART * moved[slow]:
        saw = Said(
            "The {fast} moves {times:.0f} times as far as the {slow}: {most:.1e} and {least:.1e} of their norms in a step.",
            "{fast}每步的移动是{slow}的 {times:.0f} 倍：分别为各自范数的 {most:.1e} 与 {least:.1e}。",
            fast=_TRUNKS[fast],
            slow=_TRUNKS[slow],
            times=moved[fast] / moved[slow],
            most=moved[fast],
            least=moved[slow],
        )
        means = Said(
            "Both were trained before, so one forgets while the other stands still.",
            "两者都训练过，于是一个在遗忘，另一个原地不动。",
        )
        do = Said("Bring them nearer: {rate}.", "让两者接近：{rate}。", rate=rate(stage, 0.1, fast.partition("_")[0]))
        found.append(Finding("towers apart", stage.name, saw, means, do))
    return found


def waiting(stage: StageRecords) -> list[Finding]:
    """A good part of the time passes without a step; the first line, where loaders start, left out."""
    timed = [
        (line["seconds_per_step"] * weight, line["data_wait"])
        for line, weight in zip(stage.lines[1:], stage.weights[1:], strict=True)
        if "seconds_per_step" in line and "data_wait" in line
    ]
    seconds = sum(each for each, _ in timed)
    if len(timed) < 3 or seconds < _SECONDS:
        return []
    share = sum(each * wait for each, wait in timed) / seconds
    if share <= _WAIT:
        return []
    saw = Said(
        "{share:.0%} of the time the steps waited for data ({lost:.0f} of {seconds:.0f} seconds).",
        "{share:.0%} 的时间在等数据（{seconds:.0f} 秒中的 {lost:.0f} 秒）。",
        share=share,
        lost=share * seconds,
        seconds=seconds,
    )
    means = Said("Decoding pictures is slower than training on them.", "图片解码比训练慢。")
    workers = stage.about.get("workers")
    more = f"data.workers={2 * workers}" if isinstance(workers, int) and workers else "data.workers=auto"
    decode = Said(
        "store pictures smaller, `cnclip-ft data import … --max-side 512`",
        "把图片存得更小，`cnclip-ft data import … --max-side 512`",
    )
    if workers == "auto":
        do = Said(
            "It has all cores already: {decode}, or {card} on a card.",
            "核已用满：{decode}，或在显卡上 {card}。",
            decode=decode,
            card="data.decode=device",
        )
    else:
        do = Said(
            "Give {more}; if there are no cores left, {decode}.",
            "可设 {more}；核不够时，{decode}。",
            more=more,
            decode=decode,
        )
    return [Finding("waiting for data", stage.name, saw, means, do)]


def spikes(stage: StageRecords) -> list[Finding]:
    """Losses far above those of the lines before."""
    heights = [float(line["highest_loss" if "highest_loss" in line else "loss"]) for line in stage.lines]
    found = []
    for number in range(_WINDOW, len(heights)):
        before = heights[number - _WINDOW : number]
        middle = median(before)
        deviation = median(abs(each - middle) for each in before)
        if heights[number] > _HIGH * middle and heights[number] - middle > _DEVIATIONS * deviation:
            found.append((stage.lines[number]["step"], middle, heights[number]))
    if not found:
        return []
    step, before_it, height = max(found, key=lambda each: each[2] / max(each[1], 1e-9))
    saw = Said(
        "Spikes of the loss in {count} of {all} lines, the highest up to step {step}: {before:.3f} → {height:.3f}.",
        "损失突然升高：{all} 行中有 {count} 行，最高的在第 {step} 步之前：{before:.3f} → {height:.3f}。",
        count=len(found),
        all=len(heights),
        step=step,
        before=before_it,
        height=height,
    )
    means = Said(
        "Single batches throw the model back: pairs that are wrong, or steps that are too large.",
        "个别批次让模型倒退：图文对有误，或步子太大。",
    )
    limit = stage.setting("gradient_clip")
    gentler = rate(stage, 0.5)
    do = Said("Give {gentler}.", "可设 {gentler}。", gentler=gentler)
    if not limit:
        norm = stage.mean("gradient_norm")
        do = Said(
            "Give {clip}, or {gentler}.",
            "可设 {clip}，或 {gentler}。",
            clip=key(stage, f"gradient_clip={2 * norm if norm else 1.0:.2g}"),
            gentler=gentler,
        )
    return [Finding("spikes", stage.name, saw, means, do)]


STEPS: tuple[Rule, ...] = (towers_apart, temperature_at_limit, temperature_moving, clipped, spikes, waiting)
