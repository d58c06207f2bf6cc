"""The rules of `own-data`: what a recipe leaves open follows from the data, the device and the start; each with its reason.

Pure functions: facts and what is given in, settings with reasons out. docs/training.md#settings-that-follow-from-the-data tells the rules,
and which of their numbers are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cnclip_ft.recipe_choice import Choice
from cnclip_ft.recipe_facts import ALIGN, CONTRAST, Facts
from cnclip_ft.recipe_rates import far_rate, joining_rate, suggested_rate
from cnclip_ft.recipe_sizes import batch_size, meets_new, steps
from data_tools.words import Said


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
            self.batch, why = batch_size(self.facts, self.name, self.batch_before)
            found.append(self._choice({"batch_size": self.batch, "micro_batch_size": "auto"}, why))
        each = max(self.facts.pairs // self.batch, 1)
        epochs = self.given.get("epochs")
        self.steps = _number(self.given.get("steps")) or 0
        if not self.steps and isinstance(epochs, (int, float)) and epochs > 0:
            self.steps = max(round(epochs * each), 1)
        if not self.steps:
            self.steps, why = steps(self.facts, self.name, each)
            found.append(self._choice({"steps": self.steps}, why))
        found += [self._rates(), self._table(), self._warmup(), self._averaging(), self._interpolation()]
        found += [self._regularisation(), self._smoothing(), self._pictures(), self._captions(), self._validation()]
        return [choice for choice in found if choice.settings]

    def _choice(self, settings: dict[str, Any], why: Said) -> Choice:
        left = {key: value for key, value in settings.items() if key not in self.given and value is not None}
        return Choice(self.name, left, why)

    @property
    def _meeting(self) -> bool:
        return meets_new(self.facts, self.name)

    @property
    def _pairs_alone(self) -> bool:
        """Whether it learns from pairs, and from no teacher."""
        return not self.given.get("distill") and self.given.get("kind", "pairs") == "pairs"

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
                "a new tower: 1.7e-3 at batch 128 and width 128, by the square root of the batch {batch:,} and one over the width {width:,}, "
                "at most 1.7e-3",
                "新建的塔：批量 128、宽度 128 时 1.7e-3，按批量 {batch:,} 的平方根与宽度 {width:,} 的倒数缩放，最多 1.7e-3",
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
        if (self.name == ALIGN and not self._meeting) or self.steps < 20:
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
            small, decay = small and (self.name == CONTRAST or self._meeting), 0.1 if self._meeting else 0.3
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
        why = Said(
            "the second stage begins with less certain towers and ends higher",
            "第二阶段从不那么自信的塔开始，终点更高",
        )
        given = self.given.get("objective") or {}
        softmax = (
            isinstance(given, Mapping) and given.get("kind") != "sigmoid"
        )  # that of new towers, where none is given
        if not (softmax and self._pairs_alone and self._meeting) or "label_smoothing" in given:
            return Choice(self.name, {}, why)
        return Choice(self.name, {"objective": {**given, "label_smoothing": 0.05}}, why)

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
        several = (
            self._pairs_alone and self.name == CONTRAST and self.facts.start != "whole" and self.facts.captions >= 2
        )
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
