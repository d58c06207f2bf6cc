"""What a run has found so far: scores, rows of its table, damaged images. Every state carries it."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import cnclip_ft
from cnclip_ft.data.batching import VISITS
from cnclip_ft.models.hub import repositories
from cnclip_ft.recipe import dump_recipe
from cnclip_ft.training.context import Context
from cnclip_ft.training.run_state import FORMAT
from cnclip_ft.training.stage_plan import StagePlan
from cnclip_ft.training.validation import Judgement
from data_tools.words import Said, said_in

Row = dict[str, float | None]


@dataclass
class Progress:
    """Filled while the run goes on, the same on all devices but for `damaged`, which each counts for itself."""

    token: str = field(default_factory=lambda: secrets.token_hex(8))  # says of a checkpoint that this run kept it
    identity: dict[str, Any] | None = None  # of data and model
    start_score: float | None = None  # before the first step
    guard_start: float | None = None
    languages_start: dict[str, float] = field(default_factory=dict)  # mean recall of each by itself
    rows: list[tuple[str, Row]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # said below the table
    damaged: int = 0
    judge_seconds: float = 0.0  # of the latest judgement; not in states

    def state_dict(self, context: Context) -> dict[str, Any]:
        return {
            "format": FORMAT, "run": self.token, "recipe": dump_recipe(context.recipe), "identity": self.identity,
            "visits": 0 if context.earlier_order else VISITS,
            "start_score": self.start_score, "guard_start": self.guard_start, "languages_start": self.languages_start,
            "rows": [[name, row] for name, row in self.rows], "notes": _in_both(self.notes), "damaged": self.damaged,
            "chosen": _in_both(context.recipe.chosen),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """States of versions before know no token, no notes, no languages, or notes in English alone."""
        self.languages_start = state.get("languages_start", {})
        self.token, notes = state.get("run", self.token), state.get("notes", [])
        self.notes = [note if isinstance(note, str) else Said.exactly(*note) for note in notes]
        self.start_score, self.guard_start = state["start_score"], state["guard_start"]
        self.rows, self.damaged = [(name, row) for name, row in state["rows"]], state["damaged"]


def reasons(state: dict[str, Any]) -> list[Said]:
    """What the rules of the recipe chose when the run of this state began, and why; states of versions before say nothing of it."""
    return [Said.exactly(*line) for line in state.get("chosen", [])]


def _in_both(lines: Iterable[str]) -> list[list[str]]:
    return [[str(line), said_in(line, "zh")] for line in lines]


def verdict(judgement: Judgement) -> dict[str, Any]:
    """What a checkpoint says of how good it is."""
    return {
        "scores": judgement.as_dict(), "row": judgement.row(), "mean_recall": judgement.mean_recall,
        "score": judgement.score,
    }  # fmt: skip


def _languages(context: Context, plan: StagePlan) -> list[str]:
    """What the stage and the run have learnt from, by ISO 639-1: those of a hundredth of the pairs at least, the most frequent first."""
    counts = context.pairs.spoken.copy()
    counts["zh"] += counts.pop("mixed", 0)  # Chinese with foreign names in it
    pairs = [name for name, count in counts.most_common() if name and count * 100 >= len(context.pairs)]
    return list(dict.fromkeys([*pairs, *(plan.teaching.languages if plan.teaching is not None else ())]))


def checkpoint_info(
    context: Context, plan: StagePlan, step: int, token: str, verdict: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint of the run says of itself."""
    data = {name: each.checksum() for name, each in context.evaluators.items()}
    return {
        "run": token, "stage": plan.name, "step": step, "steps": plan.total, **verdict,
        "recipe": context.recipe.model_dump(mode="json"), "data": {"train": context.train_store.checksum(), **data},
        "languages": _languages(context, plan), "base_models": repositories(context.recipe.model.start),
        "start": context.start.lines(), "precision": context.precision,
        "dimensions": list(plan.objective.dimensions),
        "versions": {"cnclip_ft": cnclip_ft.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
