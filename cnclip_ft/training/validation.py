"""How good the model is now: every entry of `data.valid` judged on all devices (`evaluation.kinds`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from cnclip_ft.collectives import statistics_of_first, together, world_size
from cnclip_ft.evaluation.kinds.contract import Evaluator, Scores
from cnclip_ft.evaluation.kinds.recall import KS, flat_row
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.features.shared_encoder import SharedEncoder, trunk_digest
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe_valid import score_path
from cnclip_ft.retrieval.recall import RetrievalScores
from cnclip_ft.training.compiling import uncompiled
from cnclip_ft.training.languages import by_language
from cnclip_ft.training.stop import Stopped, StopRequest
from data_tools import tables
from data_tools.errors import RequestError
from data_tools.words import Said, joined

_TOLD = ("scores", "guard", "seconds", "languages", "columns", "words")  # what the first device says


@dataclass
class Judgement:
    """Scores of every validation set at one moment, and of the guard split where there is one; equal on all devices.

    `columns` are those the tables have beyond recall on the first split, `words` what the line says beyond it.
    """

    scores: dict[str, Scores]
    seconds: float = field(compare=False)
    best_by: str = "mean_recall"
    guard: float | None = None  # mean recall of the guard split
    languages: dict[str, float] = field(default_factory=dict)  # mean recall of each by itself, where there are several
    columns: dict[str, float | None] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    features: SplitFeatures | None = field(default=None, repr=False, compare=False)  # of the first split, for examples

    @property
    def first(self) -> RetrievalScores:
        scores = next(iter(self.scores.values()))
        assert isinstance(scores, RetrievalScores)  # the recipe sees to it
        return scores

    @property
    def mean_recall(self) -> float:
        return self.first.mean_recall or 0.0

    @property
    def score(self) -> float:
        """What decides which checkpoint is the best."""
        split, name = score_path(self.best_by)
        value = (self.scores[split] if split else self.first).value(name)
        if value is None:
            raise RequestError(f"best_by is {self.best_by!r}, but the split has no ground truth for that")
        return value

    def as_dict(self) -> dict[str, Any]:
        values = {name: score.as_dict() for name, score in self.scores.items()}
        return values if self.guard is None else values | {"guard": {"mean_recall": self.guard}}

    def details(self) -> str:
        """What the line says beyond the first split's mean recall: other sets, languages."""
        return f" | {', '.join(self.words)}" if self.words else ""

    def row(self) -> dict[str, float | None]:
        """One flat row of the tables: t2i_r1 … i2t_r10, mean_recall of the first split, `columns`; in percent."""
        return flat_row(self.first) | self.columns


class Judge:
    """Scores a model (module docstring), on all devices at once. Changes neither its weights nor its mode.

    Args:
        evaluators: by the names of the recipe; the first is the one rows and tables show, and judges recall.
        guard: judged along, and reported apart; None for the first of `evaluators`.
        guard_score: what of it is watched; None for no guard.
        stop: may ask for an end in the middle.
    """

    def __init__(
        self,
        evaluators: Mapping[str, Evaluator],
        device: torch.device,
        workers: int,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        guard: Evaluator | None = None,
        guard_score: str | None = None,
        best_by: str = "mean_recall",
        stop: StopRequest | None = None,
    ) -> None:
        self.evaluators, self.device, self.workers, self.autocast = dict(evaluators), device, workers, autocast
        self.guard, self.best_by, self.stop = guard, best_by, stop or StopRequest()
        self.guard_score = guard_score or (None if guard is None else "mean_recall")
        self.trunk_is_frozen = False  # says whoever trains: then its features of the pictures are computed once
        self._trunk: dict[str, torch.Tensor] = {}
        self._of_trunk: str | None = None

    @cached_property
    def chance(self) -> dict[str, float | None]:
        """The row of a model that guesses."""
        row: dict[str, float | None] = {}
        for number, (name, evaluator) in enumerate(self.evaluators.items()):
            by_chance = evaluator.chance()
            row |= {f"{name}: {score}": by_chance[score] for score in evaluator.tabled} if number else by_chance
        return row

    def __call__(self, model: DualEncoder) -> Judgement:
        """Collective.

        Raises:
            Stopped: a device was asked to stop.
            Exception: judging failed on this device or, as a UserError with its message, on another.
        """
        began = time.perf_counter()
        try:
            with together(self.device), statistics_of_first(model), uncompiled():
                judgement = self._judge(model)
        except Exception:
            if self.stop.asked(self.device):
                raise Stopped from None
            raise
        judgement.seconds = time.perf_counter() - began
        if world_size() > 1:  # equal already where the devices are alike
            told = [[getattr(judgement, name) for name in _TOLD]]
            dist.broadcast_object_list(told, 0, device=self.device)
            for name, value in zip(_TOLD, told[0], strict=True):
                setattr(judgement, name, value)
        return judgement

    def _judge(self, model: DualEncoder) -> Judgement:
        encoder = SharedEncoder(
            model, workers=self.workers, autocast=self.autocast, trunk=self._kept_trunk(model), check=self.stop.check
        )
        judgement = Judgement({}, 0.0, self.best_by)
        for number, (name, evaluator) in enumerate(self.evaluators.items()):
            scores, features = evaluator.judge(name, encoder)
            judgement.scores[name] = scores
            said = evaluator.say(scores)
            if number:
                said[0] = f"{name} {said[0]}"
                judgement.columns |= {f"{name}: {score}": scores.value(score) for score in evaluator.tabled}
            else:
                judgement.features = features
                said = said[1:]  # the line begins with it
            judgement.words += said
        judgement.languages = by_language(judgement.scores.values())
        if self.guard_score is not None:
            watched = judgement.first if self.guard is None else self.guard.judge("guard", encoder)[0]
            judgement.guard = watched.value(self.guard_score)
        return judgement

    def _kept_trunk(self, model: DualEncoder) -> dict[str, torch.Tensor] | None:
        """Where features of the frozen trunk are kept, emptied when it is another."""
        digest = trunk_digest(model) if self.trunk_is_frozen else None
        if digest != self._of_trunk:
            self._trunk, self._of_trunk = {}, digest
        return None if digest is None else self._trunk


def table(rows: list[tuple[str, dict[str, float | None]]], width: int | None = None) -> str:
    """Plain-text table of named rows, text→image left, image→text right; `width` as for `tables.table`."""
    keys, heads = columns(rows)
    return tables.table(
        ["", *heads], [[name, *(cell(row.get(key)) for key in keys)] for name, row in rows], width=width
    )


def columns(rows: list[tuple[str, dict[str, float | None]]]) -> tuple[list[str], list[str]]:
    """Keys of the rows, and their headings: recall, and what else was judged."""
    keys = [f"{short}_r{k}" for short in ("t2i", "i2t") for k in KS] + ["mean_recall"]
    ways = (Said("text→image", "文→图"), Said("image→text", "图→文"))
    heads: list[str] = [Said("{way} R@{k}", "{way} R@{k}", way=way, k=k) for way in ways for k in KS]
    heads.append(Said("mean recall", "平均召回率"))
    more = [key for key in dict.fromkeys(key for _, row in rows for key in row) if key not in keys]
    return keys + more, heads + [_head(key) for key in more]


def _head(key: str) -> Said:
    """Of a further validation set: its name, and its score in the words of `Evaluator.tabled`."""
    name, _, score = key.rpartition(": ")
    return joined([name, Said.exactly(score, _SCORES.get(score, score))], " ")


_SCORES = {
    "accuracy": "准确率",
    "any_box_r1": "任一框 R@1",
    "merged_box_r1": "合并框 R@1",
    "pointing": "指点",
}


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
