"""Is B better than A, or is it chance? Paired bootstrap over the images of one split; and the interval of one model.

Captions of one image stand or fall together, so images are drawn, not captions: a draw takes as many images as the
split has, with replacement, and each brings its texts' ranks and its own. Both models are scored on the same draws,
which takes away what is merely hard about the split. The pool to search in stays whole in every draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.retrieval.recall import KS, SplitRanks
from data_tools.errors import RequestError

_DRAWS_AT_ONCE = 64


@dataclass
class HitTable:
    """One model's hits summed by image.

    `hits` float64 ``[groups, measures]`` and `asked` ``[groups, measures]``: how many queries of the group hit, of
    how many; a measure is one recall@k of one direction.
    """

    hits: torch.Tensor
    asked: torch.Tensor
    measures: list[str]


def hit_table(features: SplitFeatures, found: SplitRanks, ks: Sequence[int] = KS) -> HitTable:
    """Group queries by image; a text with several images goes with the first of them."""
    groups = len(features.image_ids)
    first_image = torch.full((len(features.text_ids),), -1, dtype=torch.int64)
    for image, text in reversed(features.positives.tolist()):
        first_image[text] = image
    columns, asked, measures = [], [], []
    for name, group, rank in (
        ("text→image", first_image[found.text_index], found.text_ranks),
        ("image→text", found.image_index, found.image_ranks),
    ):
        if not len(rank):
            continue
        size = torch.zeros(groups, dtype=torch.float64).index_add_(
            0, group, torch.ones(len(group), dtype=torch.float64)
        )
        for k in ks:
            columns.append(torch.zeros(groups, dtype=torch.float64).index_add_(0, group, (rank <= k).double()))
            asked.append(size)
            measures.append(f"{name} R@{k}")
    if not columns:
        raise RequestError("the split has no ground truth, so there is nothing to compare by")
    return HitTable(torch.stack(columns, 1), torch.stack(asked, 1), measures)


@dataclass
class Difference:
    """B − A of one measure, in percentage points, with its bootstrap interval."""

    measure: str
    first: float
    second: float
    low: float
    high: float
    better: float  # share of draws in which B is above A (ties count half)

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "B is better"
        return "A is better" if self.high < 0 else "may be chance"

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"difference": self.difference, "verdict": self.verdict}


def compare(
    a: HitTable, b: HitTable, *, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> list[Difference]:
    """Every measure, and their mean ("mean recall") last.

    Raises:
        RequestError: fewer than 100 draws, a confidence outside (0, 1), or tables of different splits.
    """
    _check(draws, confidence)
    if a.measures != b.measures or not torch.equal(a.asked, b.asked):
        raise RequestError("the two were not scored on the same split")
    used = a.asked.sum(1) > 0
    hits_a, hits_b, asked = a.hits[used], b.hits[used], a.asked[used]
    parts_a, parts_b = [], []
    for weight in _weights(len(asked), draws, seed):
        total = weight @ asked
        parts_a.append(_with_mean(100 * (weight @ hits_a) / total))
        parts_b.append(_with_mean(100 * (weight @ hits_b) / total))
    gap = torch.cat(parts_b) - torch.cat(parts_a)
    gap = gap[~gap.isnan().any(1)]  # a draw without a single query of some direction; possible in tiny splits
    whole_a = _with_mean(100 * hits_a.sum(0, keepdim=True) / asked.sum(0))[0]
    whole_b = _with_mean(100 * hits_b.sum(0, keepdim=True) / asked.sum(0))[0]
    tail = (1 - confidence) / 2
    low, high = gap.quantile(tail, dim=0), gap.quantile(1 - tail, dim=0)
    better = (gap > 0).double().mean(0) + (gap == 0).double().mean(0) / 2
    return [
        Difference(name, *(float(values[i]) for values in (whole_a, whole_b, low, high, better)))
        for i, name in enumerate([*a.measures, "mean recall"])
    ]


@dataclass
class Interval:
    """A measure of one model in percent, with its bootstrap interval."""

    measure: str
    value: float
    low: float
    high: float


def intervals(
    table: HitTable, mean: str | None = "mean recall", *, draws: int = 2000, seed: int = 0, confidence: float = 0.95
) -> list[Interval]:
    """Every measure of one model, and their mean under the name `mean` last (None: no mean); images are drawn as in `compare`.

    Raises:
        RequestError: fewer than 100 draws, or a confidence outside (0, 1).
    """
    _check(draws, confidence)
    used = table.asked.sum(1) > 0
    hits, asked = table.hits[used], table.asked[used]
    parts = [100 * (weight @ hits) / (weight @ asked) for weight in _weights(len(asked), draws, seed)]
    drawn, whole = torch.cat(parts), 100 * hits.sum(0, keepdim=True) / asked.sum(0)
    if mean is not None:
        drawn, whole = _with_mean(drawn), _with_mean(whole)
    drawn = drawn[~drawn.isnan().any(1)]
    tail = (1 - confidence) / 2
    low, high = drawn.quantile(tail, dim=0), drawn.quantile(1 - tail, dim=0)
    names = [*table.measures, *([mean] if mean is not None else [])]
    return [Interval(name, *(float(values[i]) for values in (whole[0], low, high))) for i, name in enumerate(names)]


def _check(draws: int, confidence: float) -> None:
    if draws < 100:
        raise RequestError(f"{draws} draws say little about an interval; use 100 or more")
    if not 0 < confidence < 1:
        raise RequestError(f"the confidence is {confidence}; it lies between 0 and 1, e.g. 0.95")


def _weights(groups: int, draws: int, seed: int) -> Iterator[torch.Tensor]:
    """How often each group is in each draw: float64 ``[some draws, groups]`` a turn."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        chosen = torch.randint(groups, (size, groups), generator=generator)
        weight = torch.zeros(size, groups, dtype=torch.float64)
        yield weight.scatter_add_(1, chosen, torch.ones(chosen.shape, dtype=torch.float64))


def _with_mean(recalls: torch.Tensor) -> torch.Tensor:
    return torch.cat([recalls, recalls.mean(1, keepdim=True)], 1)
