"""Findings over what a stage learnt: overfitting, too short, nothing at all, nothing that beat its start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from cnclip_ft.training.finding import Finding, Rule, key, longer, rate
from cnclip_ft.training.stage_records import StageRecords, own_loss
from data_tools.words import Said, joined

_RISES = 1.01  # of a validation loss that is said to rise: 1 %
_FALLS = 0.98  # of a training loss that goes on falling
_POINTS = 0.5  # of recall, below which validations differ by chance
_NOTHING_LEARNT = 0.98  # of ln(batch), the loss of who guesses
_TOWERS = {"image": Said("image tower", "图像塔"), "text": Said("text tower", "文本塔")}


def _place(stage: StageRecords, step: int) -> Said:
    epoch = stage.epoch(step)
    if epoch is None:
        return Said("step {step}", "第 {step} 步", step=step)
    return Said("epoch {epoch:.3g} (step {step})", "第 {epoch:.3g} 轮（第 {step} 步）", epoch=epoch, step=step)


def overfitting(stage: StageRecords) -> list[Finding]:
    """At least two validations behind the best one are worse, and the training loss goes on falling."""
    if stage.about.get("keeps") == "last":  # the score says nothing of it
        return []
    scores, trained = stage.scores, stage.training_losses
    if len(scores) < 3 or len(trained) < 3:
        return []
    by_loss, by_score = _turn(stage.pool_losses, trained), None
    if stage.unchanged is None:
        by_score = _turn([-score for score in scores], trained, by_points=True)
    turn = by_loss if by_loss is not None else by_score
    if turn is None:
        return []
    step = stage.validations[turn]["step"]
    named = {
        "place": _place(stage, step),
        "before": trained[turn],
        "after": trained[-1],
    }
    if by_loss is not None:
        pool = stage.pool_losses
        saw = Said(
            "Overfitting from {place}: the validation loss rose from {low:.3f} to {last:.3f}, while the training loss fell from {before:.3f} to "
            "{after:.3f}{gap}.",
            "从{place}起过拟合：验证损失从 {low:.3f} 升到 {last:.3f}，而训练损失从 {before:.3f} 降到 {after:.3f}{gap}。",
            low=pool[turn],
            last=pool[-1],
            gap=_gap(stage),
            **named,
        )
    else:
        saw = Said(
            "Overfitting from {place}: the score that decides fell from {high:.2f} to {last:.2f}, while the training loss fell from {before:.3f} to "
            "{after:.3f}.",
            "从{place}起过拟合：起决定作用的分数从 {high:.2f} 降到 {last:.2f}，而训练损失从 {before:.3f} 降到 {after:.3f}。",
            high=scores[turn],
            last=scores[-1],
            **named,
        )
    means = Said(
        "The model learns its pairs by heart; the best checkpoint is of an earlier step, and is what is kept.",
        "模型在背训练数据；最好的检查点来自更早的一步，保留的就是它。",
    )
    if stage.unchanged is not None:
        means = Said("The model learns its pairs by heart.", "模型在背训练数据。")
    elif scores[-1] >= max(scores):
        means = Said(
            "The model grows too sure of its pairs, but recall does not suffer yet: the last checkpoint is the best.",
            "模型对训练数据过于自信，但召回率还没有受损：最后的检查点仍是最好的。",
        )
    ways = [
        Said("learn less, {rate}", "学得少一些，{rate}", rate=rate(stage, 0.5)),
    ]
    if stage.setting("until") != "plateau":
        ways.insert(0, Said("end it earlier, {until}", "提早结束，{until}", until=key(stage, "until=plateau")))
    if "image_trunk" in stage.about.get("rates", {}) and stage.about.get("crops", True):
        ways.append(Said("vary the pictures, {crop}", "让图片有变化，{crop}", crop=key(stage, "augment.crop=0.8")))
    do = Said(
        "More pairs help most; else {ways}.", "最有用的是更多图文对；否则{ways}。", ways=joined(ways, "; or ", "；或")
    )
    return [Finding("overfitting", stage.name, saw, means, do)]


def _gap(stage: StageRecords) -> str:
    """Of the last validation; nothing where its loss is over smaller batches than training."""
    gap = stage.validations[-1].get("gap")
    return "" if gap is None else Said(" (gap now {gap:+.3f})", "（现在相差 {gap:+.3f}）", gap=gap)


def _turn(losses: Sequence[float], trained: Sequence[float], *, by_points: bool = False) -> int | None:
    """The validation from which on it gets worse, where two or more behind it are worse and training goes on."""
    if len(losses) < 3:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    behind = losses[best + 1 :]
    limit = losses[best] + _POINTS if by_points else losses[best] * _RISES
    rises = len(behind) >= 2 and min(behind[-2:]) > losses[best] and behind[-1] > limit and behind[-1] >= behind[0]
    return best if rises and trained[-1] < trained[best] * _FALLS else None


def still_rising(stage: StageRecords) -> list[Finding]:
    """The last validation is the best, and the two behind one another before it rose too."""
    scores = stage.scores
    if (
        len(scores) < 3
        or not stage.finished
        or stage.unchanged is not None
        or stage.validations[-1]["step"] < stage.lines[-1]["step"]
    ):
        return []
    gain = scores[-1] - scores[-2]
    if scores[-1] < max(scores) or not scores[-3] < scores[-2] or gain < _POINTS:
        return []
    trains = [tower for tower in _TOWERS if f"{tower}_trunk" in stage.about.get("rates", {})]
    who = _TOWERS[trains[0]] if len(trains) == 1 else Said("model", "模型")
    saw = Said(
        "The {who} was still rising when the stage ended: {before:.2f} → {last:.2f} in the last validation, which is the best.",
        "阶段结束时{who}仍在上升：最后一次验证 {before:.2f} → {last:.2f}，也是最好的一次。",
        who=who,
        before=scores[-2],
        last=scores[-1],
    )
    means = Said("It was too short: more of the same is likely to bring more.", "训练太短：继续下去很可能还会提高。")
    go_on = Said("Train longer: {longer}", "训练更久：{longer}", longer=longer(stage))
    if stage.about.get("last"):
        do = Said(
            "{go_on}; with --continue the finished run goes on.",
            "{go_on}；加 --continue 可接着这次已完成的运行。",
            go_on=go_on,
        )
    else:
        do = Said("{go_on}, in a new run.", "{go_on}，在新的运行中。", go_on=go_on)
    return [Finding("still rising", stage.name, saw, means, do)]


def nothing_learnt(stage: StageRecords) -> list[Finding]:
    """The loss of a softmax ends where it is for who guesses."""
    batch = stage.setting("batch_size")
    if (
        stage.about.get("objective") != "contrastive"
        or not batch
        or len(stage.lines) < 5
        or stage.lines[-1]["step"] < 20
    ):
        return []
    tail = stage.lines[-max(len(stage.lines) // 3, 2) :]
    loss, guess = fmean(own_loss(line) for line in tail), math.log(batch)
    if loss < _NOTHING_LEARNT * guess:
        return []
    saw = Said(
        "Learning nothing: the training loss ends at {loss:.3f}, and who guesses among {batch} pairs has ln({batch}) = {guess:.3f}.",
        "什么也没学到：训练损失停在 {loss:.3f}，而在 {batch} 对中瞎猜就是 ln({batch}) = {guess:.3f}。",
        loss=loss,
        batch=batch,
        guess=guess,
    )
    means = Said(
        "Captions may not belong to their pictures, the rate may be far too low or high, or the stage far too short for towers made new.",
        "可能是文本与图片对不上，学习率过低或过高，或者对新建的塔来说阶段太短。",
    )
    do = Said(
        "Look at pairs with `cnclip-ft data show`, then try {rate} or {longer}.",
        "先用 `cnclip-ft data show` 看看图文对，再试 {rate} 或 {longer}。",
        rate=rate(stage, 10 if _hardly_moved(stage) else 0.1),
        longer=longer(stage),
    )
    return [Finding("learning nothing", stage.name, saw, means, do)]


def _hardly_moved(stage: StageRecords) -> bool:
    """Whether no trunk moved by more than a ten-thousandth of itself in a step."""
    moved = [stage.typical("relative_updates", f"{tower}_trunk") for tower in _TOWERS]
    return max((each for each in moved if each is not None), default=0.0) < 1e-4


def _more(stage: StageRecords) -> str:
    """What lets it go on for longer: a plateau that ended it comes before its length."""
    patience = stage.setting("patience")
    if stage.ended is not None and stage.setting("until") == "plateau" and patience:
        return key(stage, f"patience={2 * patience}")
    return longer(stage)


def start_stays(stage: StageRecords) -> list[Finding]:
    """No validation beat the weights the stage began with."""
    if stage.unchanged is None or not stage.scores:
        return []
    start, best = stage.unchanged.get("score", stage.start_score), max(stage.scores)
    if start is None or best > start:  # a guard forbade what was better, as the note of the stage says
        return []
    saw = Said(
        "The stage ended with its start: no validation beat it ({start:.2f}; the best was {best:.2f}, the last {last:.2f}).",
        "阶段以起点告终：没有一次验证超过它（{start:.2f}；最好的一次 {best:.2f}，最后一次 {last:.2f}）。",
        start=start,
        best=best,
        last=stage.scores[-1],
    )
    sank = stage.scores[0] < start - _POINTS
    if sank and stage.scores[-1] > stage.scores[0] + _POINTS:
        means = Said(
            "It sank at first and was on its way back: the rate is high for what the start knows, or the stage too short.",
            "先下降，之后正在回升：对起点已学到的来说学习率偏高，或阶段太短。",
        )
        do = Said("Give {rate}, or {longer}.", "可设 {rate}，或 {longer}。", rate=rate(stage, 0.5), longer=_more(stage))
    elif sank:
        means = Said("It lost what the start knows: the rate is too high.", "丢掉了起点已学到的：学习率太高。")
        do = Said("Give {rate}.", "可设 {rate}。", rate=rate(stage, 0.25))
    else:
        means = Said(
            "It hardly changed what is judged: the start knows the pairs already, or the stage was short or slow.",
            "对被评判的几乎没有改变：起点已经会这些图文对，或阶段太短、太慢。",
        )
        do = Said("Give {rate}, or {longer}.", "可设 {rate}，或 {longer}。", rate=rate(stage, 2), longer=_more(stage))
    return [Finding("start stays", stage.name, saw, means, do)]


LEARNING: tuple[Rule, ...] = (nothing_learnt, overfitting, still_rising, start_stays)
