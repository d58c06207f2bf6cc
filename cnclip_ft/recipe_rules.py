"""The rules of `own-data`: what a recipe leaves open follows from the data, the device and the start; each with its reason.

Pure functions: facts and what is given in, settings with reasons out. docs/training.md#settings-that-follow-from-the-data tells the rules,
and which of their numbers are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cnclip_ft.recipe_choice import Choice
from cnclip_ft.recipe_rates import far_rate, joining_rate, suggested_rate
from data_tools.words import Said

NAME = "own-data"
FEWEST = 8  # pairs: two batches of four
ALIGN, CONTRAST = "align", "contrast"  # the stages whose settings follow; others have to be written out

Start = Literal["whole", "towers", "new text", "new image", "new"]


@dataclass(frozen=True)
class Facts:
    """What the rules look at. `pairs`: visits of an epoch; `images`: different pictures; `device`: cpu, cuda, …; `memory`: GiB of one
    card (None: a CPU, or not known); `devices`: processes; `width`: of the wider tower that is made new; `one_size`: of all pictures, not each
    in its own shape; `convolutions`: the image tower is a network of them, by an import path: what it learnt from had no texts; `captions`:
    of a picture, on average, as they lie in the stores."""

    pairs: int
    images: int
    device: str = "cpu"
    memory: float | None = None
    devices: int = 1
    start: Start = "whole"
    width: int = 768
    one_size: bool = True
    convolutions: bool = False
    captions: float = 1.0


EXAMPLE = Facts(pairs=10_000, images=2_000, captions=5.0)  # to look at a recipe without data


def choose(facts: Facts, given: Mapping[str, Any]) -> list[Choice]:
    """What follows for the stages `align` and `contrast`, as far as `given` has them and does not say it itself.

    Args:
        given: `stages` of the recipe, as it is written and overridden.
    """
    chosen: list[Choice] = []
    batch: int | None = None
    for name in (ALIGN, CONTRAST):
        written = given.get(name)
        if name not in given or not isinstance(written or {}, Mapping):
            continue
        # A checkpoint whose image tower has met no texts yet is, for what comes after `align`, two towers.
        apart = name == CONTRAST and facts.convolutions and facts.start == "whole"
        stage = _Stage(replace(facts, start="towers") if apart else facts, name, dict(written or {}), batch)
        chosen += stage.choices()
        batch = stage.batch
    return chosen


def facts_line(facts: Facts) -> Said:
    """What was looked at."""
    return Said(
        "{name}: {pairs:,} pairs, {images:,} pictures; {devices} × {device}{memory}; {start}",
        "{name}：{pairs:,} 个图文对，{images:,} 张图片；{devices} × {device}{memory}；{start}",
        name=NAME,
        pairs=facts.pairs,
        images=facts.images,
        devices=facts.devices,
        device=facts.device,
        memory="" if facts.memory is None else f", {facts.memory:.0f} GiB",
        start=_STARTS[facts.start],
    )


def filled(stages: Mapping[str, Any], chosen: list[Choice]) -> dict[str, Any]:
    """`stages` with what was chosen put in."""
    full = {name: dict(stage) if isinstance(stage, Mapping) else stage or {} for name, stage in stages.items()}
    for choice in chosen:
        full[choice.stage].update(choice.settings)
    return full


@dataclass
class _Stage:
    facts: Facts
    name: str
    given: dict[str, Any]
    batch_before: int | None
    batch: int = field(init=False)
    steps: int = field(init=False)

    def choices(self) -> list[Choice]:
        """One rule behind the other: each asks those above it."""
        found: list[Choice] = []
        self.batch = _number(self.given.get("batch_size")) or 0
        if not self.batch:
            self.batch, why = self._batch()
            found.append(self._choice({"batch_size": self.batch, "micro_batch_size": "auto"}, why))
        each = max(self.facts.pairs // self.batch, 1)
        epochs = self.given.get("epochs")
        self.steps = _number(self.given.get("steps")) or 0
        if not self.steps and isinstance(epochs, (int, float)) and epochs > 0:
            self.steps = max(round(epochs * each), 1)
        if not self.steps:
            self.steps, why = self._length(each)
            found.append(self._choice({"steps": self.steps}, why))
        found += [self._rates(), self._table(), self._warmup(), self._averaging(), self._interpolation()]
        found += [self._regularisation(), self._smoothing(), self._pictures(), self._captions(), self._validation()]
        return [choice for choice in found if choice.settings]

    def _choice(self, settings: dict[str, Any], why: Said) -> Choice:
        left = {key: value for key, value in settings.items() if key not in self.given and value is not None}
        return Choice(self.name, left, why)

    # ---- the batch ----------------------------------------------------------------------------------------------

    def _batch(self) -> tuple[int, Said]:
        facts = self.facts
        if self.batch_before and facts.start != "new":
            return self.batch_before, Said(
                "that of the stage before, in micro-batches with the same gradient where it does not fit; a second stage at a batch of 96, "
                "after a first one at 256, fell below its start",
                "与上一阶段相同，放不下时拆成小批，梯度不变；第一阶段 256、第二阶段批量 96 的训练曾低于起点",
            )
        most = batch_of_device(facts)
        of_data = batch_of_data(facts.pairs, facts.images)
        batch = 2 ** int(math.log2(min(most, of_data)))
        batch = max(batch - batch % facts.devices, facts.devices, 2)
        small = max(batch // 4, min(batch, 16))
        small = max(small - small % facts.devices, facts.devices)
        if self.name == ALIGN and facts.start == "new" and small < batch:
            return small, Said(
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

    # ---- how long -----------------------------------------------------------------------------------------------

    def _length(self, each: int) -> tuple[int, Said]:
        facts, rule = self.facts, _LENGTHS[self.name, self.facts.start]
        epochs = rule.epochs_on_card if facts.device != "cpu" else rule.epochs
        if rule.shrinks:
            epochs = max(min(epochs, epochs * math.sqrt(100_000 / facts.pairs)), min(epochs, 1.0))
        wanted = round(epochs * each)
        steps = max(wanted, min(rule.floor, rule.most_epochs * each), _FEWEST_STEPS)
        named = {"epochs": steps / each, "floor": rule.floor, "most": rule.most_epochs, "pairs": facts.pairs}
        if steps == wanted:
            return steps, Said(
                "{epochs:.3g} epochs of {pairs:,} pairs; the more pairs, the fewer passes",
                "{pairs:,} 个图文对的 {epochs:.3g} 轮；图文对越多，遍数越少",
                **named,
            )
        return steps, Said(
            "{epochs:.3g} epochs: few pairs need {floor} steps, but at most {most} epochs, and {least} steps in any case",
            "{epochs:.3g} 轮：图文对少时需要 {floor} 步，但最多 {most} 轮，且至少 {least} 步",
            least=_FEWEST_STEPS,
            **named,
        )

    @property
    def _kind(self) -> str:
        start = self.facts.start
        return "new" if start in ("new", "new image") else start

    # ---- rates --------------------------------------------------------------------------------------------------

    def _rates(self) -> Choice:
        rate = _rounded(far_rate(self.batch)) if self._far else self._of_towers()[0]
        start, batch = self.facts.start, self.batch
        if start == "whole":
            why = Said("published for fine-tuning at batch {batch:,}", "批量 {batch:,} 微调的已发表值", batch=batch)
        elif start == "towers" and self.name == ALIGN:
            why = Said(
                "2e-4 at batch 256, less by the square root of a smaller batch {batch:,}",
                "批量 256 时 2e-4，批量更小时按平方根减小（批量 {batch:,}）",
                batch=batch,
            )
        elif self._far:
            why = Said(
                "a convolutional network that learnt from no texts has a long way to go: 4e-4 at batch 256, less by the square root of a "
                "smaller batch {batch:,}",
                "没有从文本学习过的卷积网络还有很长的路：批量 256 时 4e-4，批量更小时按平方根减小（批量 {batch:,}）",
                batch=batch,
            )
        elif start == "towers":
            why = Said(
                "3e-5 at batch 256, by the square root of the batch {batch:,}, at most 5e-5",
                "批量 256 时 3e-5，按批量 {batch:,} 的平方根缩放，最多 5e-5",
                batch=batch,
            )
        else:
            why = Said(
                "a new tower: 1.7e-3 at batch 128 and width 128, by the square root of the batch {batch:,} and one over the width {width:,}",
                "新建的塔：批量 128、宽度 128 时 1.7e-3，按批量 {batch:,} 的平方根与宽度 {width:,} 的倒数缩放",
                batch=batch,
                width=self.facts.width,
            )
        return self._choice({"learning_rate": rate}, why)

    def _of_towers(self) -> tuple[float, float]:
        """The stage's rate, which is the text tower's, and the image tower's as a factor on it; not where that has a long way to go
        (`_far`)."""
        start, batch = self.facts.start, self.batch
        new = min(1.7e-3 * math.sqrt(min(batch, 512) / 128) * min(128 / self.facts.width, 1.0), 1.7e-3)
        gentle = suggested_rate(batch) if start == "whole" else joining_rate(batch)
        text = new if start in ("new", "new text") else gentle
        gentle = far_rate(batch) if self._image_far else gentle
        if self.name == ALIGN and start in ("towers", "new image"):
            text = min(2e-4 * math.sqrt(batch / 256), 2e-4)
        image = new if start in ("new", "new image") else gentle
        return _rounded(text), _rounded(image / text)

    @property
    def _image_far(self) -> bool:
        """Whether the image tower has a long way to go in `contrast`. Rate and table belong together: both are chosen, or neither."""
        open_ = self.given.get("train") is None and self.given.get("learning_rate") is None
        beside = self.facts.start in ("towers", "new text")
        return open_ and beside and self.name == CONTRAST and self.facts.convolutions

    @property
    def _far(self) -> bool:
        """Whether, moreover, the text tower has learnt what it can: the stage's rate is then the image tower's."""
        return self._image_far and self.facts.start == "towers"

    def _table(self) -> Choice:
        start = self.facts.start
        if self.name == ALIGN:
            # What a text tower without a past says is new altogether, projection and all; so is each new map between towers.
            heads = {"whole": 2, "towers": 5, "new image": 5, "new text": 1, "new": 1}[start]
            frozen: list[dict[str, Any]] = [{"tower": "image", "rate": 0}]
            if start != "whole" and start != "new":
                frozen = [{"tower": "image", "part": "trunk", "rate": 0}, {"tower": "image", "part": "rest", "rate": 1}]
            table = [
                *frozen,
                *_trunk_and_rest("text", 1, heads),
                {"tower": "temperature", "rate": 2 if heads == 2 else 5},
            ]
            why = Said(
                "the image tower stays, its features are computed once; the text tower comes to it, what is new faster",
                "图像塔不动，特征只算一次；文本塔向它靠拢，新的部分学得更快",
            )
            return self._choice({"train": table}, why)
        image = self._of_towers()[1]
        if start == "new":
            table = [{"tower": "text"}, {"tower": "image"}, {"tower": "temperature", "rate": 10}]
            return self._choice({"train": table}, Said("everything is new", "一切都是新的"))
        if self._far:
            table = [
                *_trunk_and_rest("image", 1, 0.5),
                *_trunk_and_rest("text", 0.05, 1),
                {"tower": "temperature", "rate": 0.5},
            ]
            why = Said(
                "the image tower, and the text tower at a twentieth of its rate: it would learn the captions by heart",
                "以图像塔为主，文本塔的学习率为其二十分之一：否则它会死记文本",
            )
            return self._choice({"train": table}, why)
        heads = 2
        table = [
            *_trunk_and_rest("image", image, heads),
            *_trunk_and_rest("text", 1, heads),
            {"tower": "temperature", "rate": heads},
        ]
        why = Said("both towers, projections and temperature twice as fast", "两座塔一起，投影与温度快一倍")
        if self._image_far:
            why = Said(
                "both towers, projections and temperature twice as fast; the image tower at 4e-4 at batch 256: a convolutional network that "
                "learnt from no texts has a long way to go",
                "两座塔一起，投影与温度快一倍；图像塔在批量 256 时 4e-4：没有从文本学习过的卷积网络还有很长的路",
            )
        return self._choice({"train": table}, why)

    def _warmup(self) -> Choice:
        most = 100 if self.facts.start == "whole" or self.facts.start == "towers" else 2000
        steps = max(min(self.steps // 10, most), 1)
        return self._choice(
            {"warmup_steps": steps if self.steps > 1 else 0},
            Said(
                "a tenth of {steps:,} steps, at most {most:,}",
                "{steps:,} 步的十分之一，最多 {most:,}",
                steps=self.steps,
                most=most,
            ),
        )

    # ---- what is averaged and held back ------------------------------------------------------------------------

    def _averaging(self) -> Choice:
        if (self.name == ALIGN and self.facts.start != "new") or self.steps < 20:
            return Choice(self.name, {}, Said("too short to average over", "太短，没有可平均的"))
        share = 50 if self.name == ALIGN else 20 if self._kind == "new" else 5
        decay = round(max(min(1 - share / self.steps, 0.999), 0.5), 3)
        return self._choice(
            {"ema": decay},
            Said(
                "averages over the last {share:.0%} of {steps:,} steps, at most 1,000",
                "对 {steps:,} 步中最后 {share:.0%} 取平均，最多 1,000 步",
                share=1 / share,
                steps=self.steps,
            ),
        )

    def _interpolation(self) -> Choice:
        wanted = 4 if self.name == CONTRAST and self._kind != "new" else None
        return self._choice(
            {"interpolate": wanted},
            Said("mixtures of start and best are judged at the end", "结束时评判起点与最佳之间的混合"),
        )

    def _regularisation(self) -> Choice:
        small, decay = self.facts.images < 100_000, 0.05
        if self._kind == "new":
            # what is made anew learns few pictures by heart, and all it knows comes from them
            first = self.name == ALIGN
            small, decay = small and (not first or self.facts.start == "new"), 0.1 if first else 0.3
        why = Said("the published decay; no gradient above 1", "已发表的权重衰减；梯度不超过 1")
        if small:
            why = Said(
                "{images:,} pictures: more decay than the published 1e-3; no gradient above 1",
                "{images:,} 张图片：权重衰减大于已发表的 1e-3；梯度不超过 1",
                images=self.facts.images,
            )
        settings: dict[str, Any] = {"weight_decay": decay if small else 1e-3, "gradient_clip": 1.0}
        if self.name == CONTRAST and self._kind != "new":
            settings["batch_norm"] = "frozen"
        return self._choice(settings, why)

    def _smoothing(self) -> Choice:
        alone = not self.given.get("distill") and self.given.get("kind", "pairs") == "pairs"
        wanted = (
            alone and self.name == ALIGN and self.facts.start == "new"
        )  # whose loss is a softmax where none is given
        return self._choice(
            {"objective": {"label_smoothing": 0.05} if wanted else None},
            Said(
                "the second stage begins with less certain towers and ends higher",
                "第二阶段从不那么自信的塔开始，终点更高",
            ),
        )

    def _pictures(self) -> Choice:
        known_by_heart = self.facts.start != "whole" and self.facts.images < 1_000_000
        wanted = self.name == CONTRAST and known_by_heart and self.facts.one_size
        crop = 0.4 if self._image_far else 0.8
        given = self.given.get("augment")
        if isinstance(given, Mapping) and given.get("size") is not None and "crop" not in given and wanted:
            why = Said("a size is that of crops, which have a share", "size 是裁剪的边长，裁剪要有面积比例")
            return Choice(self.name, {"augment": {**given, "crop": crop}}, why)
        return self._choice(
            {"augment": {"crop": crop} if wanted else None},
            Said(
                "an image tower learns {images:,} pictures by heart",
                "图像塔会记住这 {images:,} 张图片",
                images=self.facts.images,
            ),
        )

    def _captions(self) -> Choice:
        alone = not self.given.get("distill") and self.given.get("kind", "pairs") == "pairs"
        several = alone and self.name == CONTRAST and self.facts.start != "whole" and self.facts.captions >= 2
        # a small new tower is no dearer for pictures than for texts
        most = 2 if self._kind == "new" else 3
        return self._choice(
            {"captions_at_once": min(most, int(self.facts.captions)) if several else None},
            Said(
                "a picture has {captions:.3g} captions, and goes through its tower once for several",
                "每张图片有 {captions:.3g} 条文本，几条文本只需过一次图像塔",
                captions=self.facts.captions,
            ),
        )

    def _validation(self) -> Choice:
        return self._choice({"validate_every": max(-(-self.steps // 6), 1)}, Said("six times a stage", "每个阶段六次"))


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
_STARTS = {
    "whole": Said("a model trained whole", "整体训练过的模型"),
    "towers": Said("two pretrained towers that had not met", "两座互不相识的预训练塔"),
    "new text": Said("a new text tower", "新建的文本塔"),
    "new image": Said("a new image tower", "新建的图像塔"),
    "new": Said("both towers new", "两座塔都是新建的"),
}
_LEAST_MEMORY = 8.0  # GiB, where a card does not say


def batch_of_data(pairs: int, images: int) -> int:
    """Pairs a global batch may have by the data alone."""
    return max(min(pairs // 4, images // 2), min(16, pairs // 2, images), 2)


def batch_of_device(facts: Facts) -> int:
    """Pairs a global batch may have by the devices alone."""
    if facts.device == "cpu":
        return 256
    return min(int(32 * (facts.memory or _LEAST_MEMORY)) * facts.devices, 8192)


def _trunk_and_rest(tower: str, rate: float, heads: float) -> list[dict[str, Any]]:
    """`rest` is the projection, and may be nothing: some towers have none."""
    return [
        {"tower": tower, "part": "trunk", "rate": rate},
        {"tower": tower, "part": "rest", "rate": _rounded(rate * heads)},
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _number(value: Any) -> int | None:
    """A whole number above 0; whatever else stands there is refused where the recipe is checked."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
