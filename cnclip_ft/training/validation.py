"""How good the model is now: recall over the whole pool of every validation split, never in-batch accuracy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cnclip_ft.features.encode import SplitFeatures, encode_split
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.recipe import score_path
from cnclip_ft.retrieval.recall import RetrievalScores, recall
from data_tools import tables
from data_tools.errors import RequestError
from data_tools.store import PairStore

KS = (1, 5, 10)


@dataclass
class Judgement:
    """Scores of every validation split at one moment, and of the guard split where there is one."""

    scores: dict[str, RetrievalScores]
    seconds: float
    best_by: str = "mean_recall"
    guard: float | None = None  # mean recall of the guard split
    features: SplitFeatures | None = field(default=None, repr=False)  # of the first split, for example queries

    @property
    def mean_recall(self) -> float:
        return next(iter(self.scores.values())).mean_recall

    @property
    def score(self) -> float:
        """What decides which checkpoint is the best."""
        split, direction, name = score_path(self.best_by)
        scores = self.scores[split] if split else next(iter(self.scores.values()))
        if direction is None:
            return scores.mean_recall
        found = getattr(scores, direction)
        if found is None:
            raise RequestError(f"best_by is {self.best_by!r}, but the split has no ground truth in that direction")
        return found.mean_recall if name == "mean_recall" else found.recall[int(name[1:])]

    def as_dict(self) -> dict[str, Any]:
        values = {name: score.as_dict() for name, score in self.scores.items()}
        return values if self.guard is None else values | {"guard": {"mean_recall": self.guard}}

    def details(self) -> str:
        """What the line says beyond the first split's mean recall: other splits, languages."""
        parts = []
        for number, (name, scores) in enumerate(self.scores.items()):
            if number:
                parts.append(f"{name} {scores.mean_recall:.2f}")
            parts += [f"{lang} {part.mean_recall:.2f}" for lang, part in scores.by_language.items() if part.mean_recall]
        return f" | {', '.join(parts)}" if parts else ""

    def row(self) -> dict[str, float | None]:
        """The first split as a flat row: t2i_r1 … i2t_r10, mean_recall, in percent."""
        return flat_row(next(iter(self.scores.values())))


def flat_row(scores: RetrievalScores) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for short, direction in (("t2i", scores.text_to_image), ("i2t", scores.image_to_text)):
        for k in KS:
            row[f"{short}_r{k}"] = None if direction is None else direction.recall[k]
    return row | {"mean_recall": scores.mean_recall}


class Judge:
    """Scores a model on the validation splits (module docstring). Changes neither its weights nor its mode.

    Args:
        stores: by the names of the recipe; the first is the one rows and tables show.
        guard: judged along, and reported apart.
    """

    def __init__(
        self, stores: dict[str, PairStore], device: torch.device, workers: int, autocast, *,
        guard: PairStore | None = None, best_by: str = "mean_recall",
    ) -> None:  # fmt: skip
        for name, store in stores.items():
            if len(store) == 0:
                raise RequestError(f"data.valid: {name} ({store.path}) has no pairs, so there is nothing to judge by")
        self.stores, self.device, self.workers, self.autocast = stores, device, workers, autocast
        self.guard, self.best_by = guard, best_by
        self.chance: dict[str, float | None] | None = None

    def __call__(self, model: DualEncoder) -> Judgement:
        began, scores, first = time.perf_counter(), {}, None
        for name, store in self.stores.items():
            features = self._encode(model, store)
            if first is None:
                first = features
                self.chance = self.chance or chance_row(features)
            scores[name] = recall(features, ks=KS)
        guard = None if self.guard is None else recall(self._encode(model, self.guard), ks=KS).mean_recall
        return Judgement(scores, time.perf_counter() - began, self.best_by, guard, first)

    def _encode(self, model: DualEncoder, store: PairStore) -> SplitFeatures:
        with self.autocast():
            return encode_split(model, store, workers=self.workers)


def chance_row(features: SplitFeatures) -> dict[str, float | None]:
    """Expected recall of a random order: the mean over queries of the chance that a positive is among the first k."""
    images, texts = features.positives[:, 0], features.positives[:, 1]
    row: dict[str, float | None] = {}
    for short, queries, gallery in (("t2i", texts, len(features.image_ids)), ("i2t", images, len(features.text_ids))):
        counts = torch.unique(queries, return_counts=True)[1].tolist()
        for k in KS:
            row[f"{short}_r{k}"] = 100 * sum(_hit(gallery, count, min(k, gallery)) for count in counts) / len(counts)
    return row | {"mean_recall": sum(row.values()) / len(row)}


def _hit(gallery: int, positives: int, k: int) -> float:
    return 1 - math.comb(gallery - positives, k) / math.comb(gallery, k) if gallery - positives >= k else 1.0


def table(rows: list[tuple[str, dict[str, float | None]]], width: int | None = None) -> str:
    """Plain-text table of named rows, text→image left, image→text right; `width` as for `tables.table`."""
    keys, heads = columns()
    return tables.table(
        ["", *heads], [[name, *(cell(row.get(key)) for key in keys)] for name, row in rows], width=width
    )


def columns() -> tuple[list[str], list[str]]:
    """Keys of a row, and their headings."""
    keys = [f"{short}_r{k}" for short in ("t2i", "i2t") for k in KS] + ["mean_recall"]
    return keys, [f"{arrow} R@{k}" for arrow in ("text→image", "image→text") for k in KS] + ["mean recall"]


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
