"""What a run's journal says of each stage, put in order: what the findings look at. Journals of earlier versions have less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class StageRecords:
    """Records of a stage, each step once: what a continued run says again counts.

    `about` is its record of kind ``stage``, empty in a journal that has none; `start_score` what the weights it began with scored.
    """

    name: str
    about: Record = field(default_factory=dict)
    lines: tuple[Record, ...] = ()  # over steps
    validations: tuple[Record, ...] = ()  # after steps
    ended: Record | None = None  # before its last step
    unchanged: Record | None = None  # nothing beat its start
    start_score: float | None = None

    def setting(self, name: str) -> Any:
        return self.about.get("settings", {}).get(name)

    def epoch(self, step: int) -> float | None:
        each = self.about.get("steps_per_epoch")
        return step / each if each else None

    @property
    def finished(self) -> bool:
        """Whether it came to its last step."""
        return bool(self.lines) and self.ended is None and self.lines[-1]["step"] >= self.about.get("total", math.inf)

    @property
    def scores(self) -> list[float]:
        """What decides, of every validation."""
        return [float(judged["score" if "score" in judged else "mean_recall"]) for judged in self.validations]

    @cached_property
    def pool_losses(self) -> list[float]:
        """Of every validation; empty where one has none."""
        found = [judged.get("loss") for judged in self.validations]
        return [] if None in found else [loss for loss in found if loss is not None]

    @cached_property
    def training_losses(self) -> list[float]:
        """Means over the steps before every validation; empty where there are none before one."""
        means: list[float] = []
        before = 0
        for judged in self.validations:
            inside = [own_loss(line) for line in self.lines if before < line["step"] <= judged["step"]]
            if "training_loss" not in judged and not inside:
                return []
            means.append(judged["training_loss"] if "training_loss" in judged else fmean(inside))
            before = judged["step"]
        return means

    @cached_property
    def weights(self) -> list[int]:
        """Steps that each line is over."""
        steps = [0, *(line["step"] for line in self.lines)]
        return [max(step - before, 1) for before, step in zip(steps, steps[1:], strict=False)]

    def mean(self, key: str) -> float | None:
        """Over all steps whose lines have it."""
        pairs = [(line[key], weight) for line, weight in zip(self.lines, self.weights, strict=True) if key in line]
        return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None

    def series(self, key: str, part: str) -> list[float]:
        """A number of a part of the model, of every line that has it."""
        return [line[key][part] for line in self.lines if part in line.get(key, {})]

    def typical(self, key: str, part: str) -> float | None:
        found = self.series(key, part)
        return median(found) if found else None


def own_loss(line: Mapping[str, Any]) -> float:
    """The loss of the pairs alone, where a teacher or hard negatives have a part in what is made small."""
    return float(line.get("pairs", line["loss"]))


def stages_of(records: Iterable[Record]) -> list[StageRecords]:
    """The stages that a journal has steps or validations of, in their order."""
    found: dict[str, dict[str, Any]] = {}
    start: float | None = None
    for record in records:
        kind, name = record.get("kind"), record.get("stage")
        if name is None:
            continue
        if kind == "validation" and name == "start":
            start = record.get("score", record.get("mean_recall"))
        elif kind in ("stage", "train", "validation", "ended", "unchanged"):
            stage = found.setdefault(name, {"lines": {}, "validations": {}, "start_score": None})
            if kind in ("train", "validation"):  # it went on after it was over
                stage |= {"ended": None, "unchanged": None}
            if kind == "train":
                stage["lines"][record["step"]] = record
            elif kind == "validation" and record["step"]:
                stage["validations"][record["step"]] = record
            elif kind == "validation":
                stage["start_score"] = record.get("score")
            else:
                stage["about" if kind == "stage" else kind] = record
    stages = []
    for name, stage in found.items():
        lines, validations = (
            tuple(each for _, each in sorted(stage.pop(key).items())) for key in ("lines", "validations")
        )
        if stage["start_score"] is None:
            stage["start_score"] = start
        whole = StageRecords(name, lines=lines, validations=validations, **stage)
        if lines or validations:
            stages.append(whole)
        start = max([*whole.scores, *([start] if start is not None else [])], default=None)
    return stages
