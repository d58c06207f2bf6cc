"""How good the model is now: recall over the whole pool of every validation split, never in-batch accuracy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from cnclip_ft.evaluation.encode import SplitFeatures, encode_split
from cnclip_ft.evaluation.retrieval import RetrievalScores, recall
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError
from data_tools.store import PairStore

KS = (1, 5, 10)


@dataclass
class Judgement:
    """Scores of every validation split at one moment; the first split's mean recall decides what is best."""

    scores: dict[str, RetrievalScores]
    seconds: float

    @property
    def mean_recall(self) -> float:
        return next(iter(self.scores.values())).mean_recall

    def as_dict(self) -> dict[str, Any]:
        return {name: score.as_dict() for name, score in self.scores.items()}

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
    """Scores a model on the validation splits (module docstring). Changes neither its weights nor its mode."""

    def __init__(self, stores: dict[str, PairStore], device: torch.device, workers: int, autocast) -> None:
        for name, store in stores.items():
            if len(store) == 0:
                raise RequestError(f"data.valid: {name} ({store.path}) has no pairs, so there is nothing to judge by")
        self.stores, self.device, self.workers, self.autocast = stores, device, workers, autocast
        self.chance: dict[str, float | None] | None = None

    def __call__(self, model: DualEncoder) -> Judgement:
        began, modes = time.perf_counter(), {name: module.training for name, module in model.named_modules()}
        model.eval()
        scores = {}
        for store in self.stores.values():
            with self.autocast():
                features = encode_split(model, store, workers=self.workers)
            if self.chance is None:
                self.chance = chance_row(features)
            scores[store.name if store.name not in scores else str(store.path)] = recall(features, ks=KS)
        for name, module in model.named_modules():
            module.training = modes[name]
        return Judgement(scores, time.perf_counter() - began)


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


def table(rows: list[tuple[str, dict[str, float | None]]]) -> str:
    """Plain-text table of named rows, text→image left, image→text right."""
    keys = [f"{short}_r{k}" for short in ("t2i", "i2t") for k in KS] + ["mean_recall"]
    heads = [f"{arrow} R@{k}" for arrow in ("text→image", "image→text") for k in KS] + ["mean recall"]
    width = max(len(name) for name, _ in rows)
    lines = [" " * width + "  " + "  ".join(head.rjust(14) for head in heads)]
    for name, row in rows:
        cells = ["–" if row.get(key) is None else f"{row[key]:.1f}" for key in keys]
        lines.append(name.ljust(width) + "  " + "  ".join(cell.rjust(14) for cell in cells))
    return "\n".join(lines)
