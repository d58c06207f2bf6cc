"""How well boxes and heat maps meet the boxes of a phrase. Three protocols, whose numbers are never mixed.

* **Any-box** (GLIP, arXiv 2112.03857): a phrase is hit when one of the k best boxes has IoU ≥ 0.5 with any of its boxes.
* **Merged-box** (MDETR, arXiv 2104.12763): its boxes are first replaced by the one box around them all.
* **RefCOCO accuracy**: the best box has IoU ≥ 0.5 with the one box that a phrase has; phrases with several are left out.

And the **pointing game** (arXiv 1608.00507): the hottest place lies in one of the phrase's boxes. Boxes that score the same as one
that hits stand before it: ties count against the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnclip_ft.grounding.boxes import iou
from cnclip_ft.grounding.heat import WHOLE, Box, Region

KS = (1, 5, 10)
NEAR = 0.5  # the IoU from which on a box is hit


@dataclass(frozen=True)
class Judged:
    """One phrase in one picture.

    Args:
        any_rank, merged_rank: of the first box that hits, from 1 on; None where none does.
        single: whether the phrase has one box.
        pointing, chance, centre: 0 to 1: whether the hottest place lies in a box (the share of it, where several places are the
            hottest), what a map that is the same everywhere gets, and whether the picture's centre lies in one.
    """

    any_rank: int | None
    merged_rank: int | None
    single: bool
    pointing: float
    chance: float
    centre: float


def judge(
    found: Sequence[Region],
    hottest: Sequence[Box],
    boxes: Sequence[Box],
    seen: Box = WHOLE,
    merged_found: Sequence[Region] | None = None,
) -> Judged:
    """
    Args:
        found: boxes with scores.
        merged_found: candidates for the one box around all; None: `found`.
        hottest: the hottest place (`Heat.hottest`); several where they are equal.
        boxes: the phrase's own, at least one.
        seen: the part of the picture that the heat map lies over.
    """
    own = np.array(boxes, np.float64)
    merged = enclosing(own)
    if len(hottest) == 1:
        x, y, width, height = hottest[0]
        pointing = float(inside(own, x + width / 2, y + height / 2))
    else:
        pointing = covered(hottest, boxes)
    return Judged(
        _rank(found, own),
        _rank_in_order(merged_found, merged) if merged_found is not None else _rank(found, merged),
        len(own) == 1,
        pointing,
        covered([seen], boxes),
        float(inside(own, 0.5, 0.5)),
    )


@dataclass(frozen=True)
class GroundingScores:
    """Of many phrases, in percent; a recall by its k.

    Args:
        any_bound, merged_bound: of phrases that any box at all hits, however far behind.
        accuracy: of the `singles`; None where there is none.
    """

    phrases: int
    any_box: dict[int, float]
    any_bound: float
    merged_box: dict[int, float]
    merged_bound: float
    singles: int
    accuracy: float | None
    pointing: float
    chance: float
    centre: float


def scores(judged: Sequence[Judged]) -> GroundingScores:
    """Of at least one phrase; every phrase counts the same."""

    def recall(ranks: Sequence[int | None]) -> tuple[dict[int, float], float]:
        by_k = {k: _percent([rank is not None and rank <= k for rank in ranks]) for k in KS}
        return by_k, _percent([rank is not None for rank in ranks])

    any_box, any_bound = recall([one.any_rank for one in judged])
    merged_box, merged_bound = recall([one.merged_rank for one in judged])
    singles = [one.any_rank == 1 for one in judged if one.single]
    return GroundingScores(
        len(judged),
        any_box,
        any_bound,
        merged_box,
        merged_bound,
        len(singles),
        _percent(singles) if singles else None,
        _percent([one.pointing for one in judged]),
        _percent([one.chance for one in judged]),
        _percent([one.centre for one in judged]),
    )


def _percent(values: Sequence[float]) -> float:
    return 100 * float(np.mean(values))


def _rank(found: Sequence[Region], own: np.ndarray) -> int | None:
    if not found or not (hits := _hits(found, own)).any():
        return None
    points = np.array([region.score for region in found])
    best = points[hits].max()
    return 1 + int((~hits & (points >= best)).sum())


def _rank_in_order(found: Sequence[Region], own: np.ndarray) -> int | None:
    """As `_rank`, of boxes whose order is theirs by rule, not by score."""
    if not found or not (hits := _hits(found, own)).any():
        return None
    return 1 + int(hits.argmax())


def _hits(found: Sequence[Region], own: np.ndarray) -> np.ndarray:
    """Which of the boxes found lie on one of `own`, bool ``[found]``."""
    stored = (
        torch.tensor([region.box for region in found], dtype=torch.float64),
        torch.as_tensor(own, dtype=torch.float64),
    )
    mine, right = (torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) for boxes in stored)
    hits: np.ndarray = (iou(mine[:, None], right) >= NEAR).any(1).numpy()
    return hits


def enclosing(boxes: np.ndarray) -> np.ndarray:
    """The one box around ``[n, 4]``, as ``[1, 4]``."""
    low = boxes[:, :2].min(0)
    return np.concatenate([low, (boxes[:, :2] + boxes[:, 2:]).max(0) - low])[None]


def inside(boxes: np.ndarray, x: float, y: float) -> bool:
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return bool(((low <= (x, y)) & ((x, y) <= high)).all(1).any())


def covered(places: Sequence[Box], boxes: Sequence[Box]) -> float:
    """The share of the area of `places` that lies in any of `boxes`; overlaps count once, and edges are exact."""
    both = np.array([*places, *boxes], np.float64)
    edges = [np.unique(np.concatenate([both[:, axis], both[:, axis] + both[:, axis + 2]])) for axis in (0, 1)]
    across, down = (np.diff(edge) for edge in edges)

    def cells(some: Sequence[Box]) -> np.ndarray:
        marked = np.zeros((len(down), len(across)), bool)
        for x, y, width, height in some:
            left, right = np.searchsorted(edges[0], (x, x + width))
            top, bottom = np.searchsorted(edges[1], (y, y + height))
            marked[top:bottom, left:right] = True
        return marked

    area = down[:, None] * across[None]
    of = cells(places)
    return float((area * (of & cells(boxes))).sum() / (area * of).sum())
