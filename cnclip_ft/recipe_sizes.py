"""How many pairs are shown at once, and how long: the first of the rules of `own-data`, from which most others follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnclip_ft.recipe_facts import ALIGN, CONTRAST, Facts
from data_tools.words import Said

_LEAST_MEMORY = 8.0  # GiB, where a card does not say


def meets_new(facts: Facts, stage: str) -> bool:
    """Whether two newly made towers meet in it: the image tower says by chance what it says, and the text tower has all to learn."""
    return stage == ALIGN and facts.start == "new"


def batch_of_data(pairs: int, images: int) -> int:
    """Pairs a global batch may have by the data alone."""
    return max(min(pairs // 4, images // 2), min(16, pairs // 2, images), 2)


def batch_of_device(facts: Facts) -> int:
    """Pairs a global batch may have by the devices alone."""
    if facts.device == "cpu":
        return 256
    return min(int(32 * (facts.memory or _LEAST_MEMORY)) * facts.devices, 8192)


def batch_size(facts: Facts, stage: str, before: int | None) -> tuple[int, Said]:
    """Pairs of a global batch; `before`: of the stage before, if there is one."""
    if before and facts.start != "new":
        return before, Said(
            "that of the stage before, in micro-batches with the same gradient where it does not fit; a second stage at a batch of 96, "
            "after a first one at 256, fell below its start",
            "与上一阶段相同，放不下时拆成小批，梯度不变；第一阶段 256、第二阶段批量 96 的训练曾低于起点",
        )
    most = batch_of_device(facts)
    of_data = batch_of_data(facts.pairs, facts.images)
    batch = 2 ** int(math.log2(min(most, of_data)))
    batch = max(batch - batch % facts.devices, facts.devices, 2)
    quarter = max(batch // 4, min(batch, 16))
    quarter = max(quarter - quarter % facts.devices, facts.devices)
    if meets_new(facts, stage) and quarter < batch:
        return quarter, Said(
            "a quarter of what the data and the device allow ({batch:,}): a new text tower learns from many small steps",
            "数据与设备所容许的批量（{batch:,}）的四分之一：新建的文本塔靠许多小步学习",
            batch=batch,
        )
    if of_data < most:
        return batch, Said(
            "at most a quarter of the {pairs:,} pairs and half of the {images:,} pictures, so that an epoch is several steps and a "
            "picture rarely meets itself, yet up to 16 where that is fewer",
            "不超过 {pairs:,} 个图文对的四分之一和 {images:,} 张图片的一半，使每轮有好几步、图片很少遇到自己；不足 16 时至多取到 16",
            pairs=facts.pairs,
            images=facts.images,
        )
    if facts.device == "cpu":
        return batch, Said(
            "what was measured on a CPU; larger ones wait long for a step",
            "在 CPU 上实测过；更大的批量一步要等很久",
        )
    return batch, Said(
        "32 pairs for every GiB of {devices} × {memory:.0f} GiB, at most 8,192",
        "每 GiB 显存 32 对（{devices} × {memory:.0f} GiB），最多 8,192",
        devices=facts.devices,
        memory=facts.memory or _LEAST_MEMORY,
    )


@dataclass(frozen=True)
class _Length:
    """Epochs on a CPU and on a card; where that is few steps, `floor` of them, but at most `most_epochs`."""

    epochs: float
    epochs_on_card: float
    floor: int
    most_epochs: int
    shrinks: bool = True  # with the square root of the pairs above 100,000, to one epoch


_FEWEST_STEPS = 50
_LENGTHS = {
    (ALIGN, "whole"): _Length(2, 2, 70, 10),
    (ALIGN, "towers"): _Length(4, 5, 150, 30),
    (ALIGN, "new text"): _Length(5, 10, 500, 50),
    (ALIGN, "new image"): _Length(0.25, 0.25, 120, 10),
    (ALIGN, "new"): _Length(1.5, 1.5, 500, 50),
    (CONTRAST, "whole"): _Length(1, 3, 70, 10),
    (CONTRAST, "towers"): _Length(1, 3, 70, 10),
    (CONTRAST, "new text"): _Length(1, 3, 70, 10),
    (CONTRAST, "new image"): _Length(5, 10, 1000, 100, shrinks=False),
    (CONTRAST, "new"): _Length(5, 10, 1000, 100, shrinks=False),
}


def steps(facts: Facts, stage: str, each: int) -> tuple[int, Said]:
    """How many, with `each` in an epoch."""
    rule = _LENGTHS[stage, facts.start]
    epochs = rule.epochs_on_card if facts.device != "cpu" else rule.epochs
    if rule.shrinks:
        epochs = max(min(epochs, epochs * math.sqrt(100_000 / facts.pairs)), min(epochs, 1.0))
    wanted = round(epochs * each)
    found = max(wanted, min(rule.floor, rule.most_epochs * each), _FEWEST_STEPS)
    named = {"epochs": found / each, "floor": rule.floor, "most": rule.most_epochs, "pairs": facts.pairs}
    if found == wanted:
        return found, Said(
            "{epochs:.3g} epochs of {pairs:,} pairs; the more pairs, the fewer passes",
            "{pairs:,} 个图文对的 {epochs:.3g} 轮；图文对越多，遍数越少",
            **named,
        )
    return found, Said(
        "{epochs:.3g} epochs: few pairs need {floor} steps, but at most {most} epochs, and {least} steps in any case",
        "{epochs:.3g} 轮：图文对少时需要 {floor} 步，但最多 {most} 轮，且至少 {least} 步",
        least=_FEWEST_STEPS,
        **named,
    )
