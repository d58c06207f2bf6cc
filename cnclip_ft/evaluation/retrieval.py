"""Exact top-k and recall both ways over the whole pool, in bounded memory (module `tiles`).

The rank of a query is 1 + the number of gallery items that are not its positives and score at least as high as
its best positive: a tie counts against the model, so a model that gives everything the same feature does not
score 100. Recall@k is the share of queries with rank <= k. A query's other positives never push it down.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cnclip_ft.evaluation.encode import SplitFeatures
from cnclip_ft.evaluation.tiles import (
    DEFAULT_MEMORY,
    TIE,
    Side,
    error_bound,
    exact,
    full_precision,
    parse_memory,
    settle_device,
    tile_shape,
)

KS = (1, 5, 10)
_MARGIN = 8  # candidates kept beyond k, so that rounding seldom asks for a second look
_BLOCK = 64  # columns whose maximum is looked at before the columns themselves
UNLABELLED = "unlabelled"


def topk(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best gallery items of every query, exact.

    Args:
        queries: ``[q, dim]``, any float type. gallery: ``[g, dim]``.
        k: at most g are given.
        memory: bound for what is allocated beside the features and the answer.
        device: where to compute; default where the queries lie.

    Returns:
        float32 scores and int64 gallery indices, both ``[q, min(k, g)]`` on the CPU, best first; among equal
        scores the lower index comes first, as in the official ``make_topk_predictions``.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    size, where = parse_memory(memory), settle_device(device, queries)
    with full_precision():
        q, g = Side(queries, where, size, "query"), Side(gallery, where, size, "gallery")
        k = min(k, len(g))
        values = torch.empty(len(q), k)
        indices = torch.empty(len(q), k, dtype=torch.int64)
        if k == 0 or len(q) == 0:
            return values, indices
        keep = min(k + _MARGIN, len(g))
        rows, columns = tile_shape(len(q), len(g), size, where)
        bound, scale = error_bound(q, g), q.norms * g.largest
        for start, tile in q.tiles(rows):
            stop = start + len(tile)
            lowest, found = _candidates(tile, g, keep, columns)
            score, order = _settle(q, g, torch.arange(start, stop, device=where), found, scale[start:stop])
            values[start:stop], indices[start:stop] = score[:, :k].float().cpu(), order[:, :k].cpu()
            if keep < len(g):
                open_rows = lowest.double() + bound[start:stop] >= score[:, k - 1] - TIE * scale[start:stop]
                again = open_rows.nonzero()[:, 0] + start
                for rest in again.split(max(1, size // (32 * len(g)))):
                    score, order = _look_again(q, g, rest, k, columns, scale[rest])
                    values[rest.cpu()], indices[rest.cpu()] = score.float().cpu(), order.cpu()
    return values, indices
    return values, indices


def _candidates(tile: torch.Tensor, gallery: Side, keep: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` best by float32 score, unordered: the lowest of their scores ``[rows]``, indices ``[rows, keep]``."""
    best = torch.full((len(tile), 0), 0.0, device=tile.device)
    where = torch.empty((len(tile), 0), dtype=torch.int64, device=tile.device)
    for first, part in gallery.tiles(columns):
        scores = tile @ part.T
        width = scores.shape[1]
        blocks = width // _BLOCK
        if blocks > 2 * keep:
            # The best `keep` lie in the `keep` blocks with the highest maxima, or in the ragged end.
            body = scores[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
            chosen = body.amax(2).topk(keep, dim=1, sorted=False).indices
            values = body.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
            index = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=tile.device)).flatten(1)
            if width > blocks * _BLOCK:
                values = torch.cat([values, scores[:, blocks * _BLOCK :]], 1)
                rest = torch.arange(blocks * _BLOCK, width, device=tile.device).expand(len(tile), -1)
                index = torch.cat([index, rest], 1)
        else:
            values, index = scores, torch.arange(width, device=tile.device).expand(len(tile), -1)
        del scores
        top = values.topk(min(keep, values.shape[1]), dim=1, sorted=False)
        best = torch.cat([best, top.values], 1)
        where = torch.cat([where, index.gather(1, top.indices) + first], 1)
        if best.shape[1] > keep:
            top = best.topk(keep, dim=1, sorted=False)
            best, where = top.values, where.gather(1, top.indices)
    return best.amin(1), where


def _look_again(
    queries: Side, gallery: Side, rest: torch.Tensor, k: int, columns: int, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of the queries `rest` from all their float64 scores: for rows whose k-th place float32 cannot decide."""
    wide = queries.rows(rest)
    scores = torch.cat([wide @ part.double().T for _, part in gallery.tiles(columns)], 1)
    scores = (scores / _grid(scale)[:, None]).round_()
    last = scores.topk(k, dim=1).values[:, -1:]
    tied = scores == last
    # Of those that tie for the last places, the first in the gallery's order are taken.
    room = k - (scores > last).sum(1, keepdim=True)
    chosen = (scores > last) | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
    found = chosen.nonzero()[:, 1].view(len(rest), k)
    return _settle(queries, gallery, rest, found, scale)


def _grid(scale: torch.Tensor) -> torch.Tensor:
    """float64 scores are rounded to multiples of this before they are put in order, so that equal ones are equal."""
    return (TIE * scale).clamp_min(torch.finfo(torch.float64).tiny)


def _settle(
    queries: Side, gallery: Side, asking: torch.Tensor, found: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 scores and indices of the candidates ``[rows, n]``: highest first, equal ones by index."""
    order = found.sort(dim=1).values
    rows = asking.repeat_interleave(found.shape[1])
    score = exact(queries, gallery, rows, order.flatten()).view(order.shape)
    ranked = (score / _grid(scale)[:, None]).round().sort(dim=1, descending=True, stable=True).indices
    return score.gather(1, ranked), order.gather(1, ranked)


def ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    positives: torch.Tensor,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Rank of every query's best positive (definition: module docstring).

    Args:
        queries: ``[q, dim]``. gallery: ``[g, dim]``.
        positives: int64 ``[m, 2]``, (query, gallery item); repeated rows count once.

    Returns:
        int64 ``[q]`` on the CPU, 1 is best; 0 where a query has no positive.
    """
    size, where = parse_memory(memory), settle_device(device, queries)
    answer = torch.zeros(len(queries), dtype=torch.int64)
    if len(positives) == 0:
        return answer
    with full_precision():
        pairs = positives.unique(dim=0)
        asked, row = pairs[:, 0].unique(return_inverse=True)
        q = Side(queries if len(asked) == len(queries) else queries[asked.to(queries.device)], where, size, "query")
        g = Side(gallery, where, size, "gallery")
        row, item = row.to(where), pairs[:, 1].to(where)
        scale = q.norms * g.largest
        score = exact(q, g, row, item)
        best = torch.full((len(q),), -torch.inf, dtype=torch.float64, device=where)
        best = best.scatter_reduce(0, row, score, "amax") - TIE * scale  # from here on "at least as high" means this
        own = torch.zeros(len(q), dtype=torch.int64, device=where)
        own.index_add_(0, row, (score >= best[row]).long())
        # 2⁻²²·|best| covers the rounding of the two limits themselves to float32.
        bound = error_bound(q, g) + 2.0**-22 * best.abs() + TIE * scale
        rows, columns = tile_shape(len(q), len(g), size, where)
        above = torch.zeros(len(q), dtype=torch.int64, device=where)
        for start, tile in q.tiles(rows):
            part = slice(start, start + len(tile))
            high, low = (best + bound)[part].float()[:, None], (best - bound)[part].float()[:, None]
            for first, other in g.tiles(columns):
                scores = tile @ other.T
                surely, maybe = scores > high, scores >= low
                above[part] += surely.sum(1)
                at, column = maybe.logical_xor_(surely).nonzero(as_tuple=True)
                if len(at) * 16 > scores.numel() and scores.numel() > 2**16:
                    # Nearly equal scores everywhere (a collapsed model): a float64 product is cheaper than pairs.
                    again = _float64_hits(tile, other, best[part])
                    above[part] += (again & maybe).sum(1)
                else:
                    hits = exact(q, g, at + start, column + first) >= best[at + start]
                    above.index_add_(0, at + start, hits.long())
        answer[asked.cpu()] = (1 + above - own).cpu()
    return answer


def _float64_hits(tile: torch.Tensor, other: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """bool ``[rows, columns]``: scores at least as high as `best`; in slices, as float64 takes twice the room."""
    hits = torch.empty(len(tile), len(other), dtype=torch.bool, device=tile.device)
    wide = tile.double()
    for start in range(0, len(other), 4096):
        piece = slice(start, start + 4096)
        hits[:, piece] = wide @ other[piece].double().T >= best[:, None]
    return hits


@dataclass
class Direction:
    """Scores of one direction; `recall` in percent by k."""

    recall: dict[int, float]
    median_rank: float
    queries: int
    gallery: int

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)

    def as_dict(self) -> dict[str, Any]:
        scores: dict[str, Any] = {f"r{k}": value for k, value in self.recall.items()}
        return scores | {
            "mean_recall": self.mean_recall, "median_rank": self.median_rank,
            "queries": self.queries, "gallery": self.gallery,
        }  # fmt: skip


@dataclass
class RetrievalScores:
    """Both directions (None: no ground truth), the same per language, and what was left out and why."""

    text_to_image: Direction | None
    image_to_text: Direction | None
    by_language: dict[str, RetrievalScores] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def mean_recall(self) -> float | None:
        """Mean of all recalls of all directions, in percent; None without any ground truth."""
        means = [direction.mean_recall for direction in (self.text_to_image, self.image_to_text) if direction]
        return sum(means) / len(means) if means else None

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "mean_recall": self.mean_recall,
            "text_to_image": self.text_to_image and self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text and self.image_to_text.as_dict(),
        }
        if self.by_language:
            values["by_language"] = {name: scores.as_dict() for name, scores in self.by_language.items()}
        if self.notes:
            values["notes"] = list(self.notes)
        return values


@dataclass
class SplitRanks:
    """Ranks of the queries that have a positive, with their indices in the split, ready to be compared."""

    text_index: torch.Tensor
    text_ranks: torch.Tensor
    image_index: torch.Tensor
    image_ranks: torch.Tensor


def split_ranks(
    features: SplitFeatures, *, memory: str | int = DEFAULT_MEMORY, device: torch.device | str | None = None
) -> SplitRanks:
    """Ranks both ways over the whole pool."""
    images, texts, positives = features.image_features, features.text_features, features.positives
    by_text = ranks(texts, images, positives.flip(1), memory=memory, device=device)
    by_image = ranks(images, texts, positives, memory=memory, device=device)
    text_index, image_index = by_text.nonzero()[:, 0], by_image.nonzero()[:, 0]
    return SplitRanks(text_index, by_text[text_index], image_index, by_image[image_index])


def summarise(found: torch.Tensor, gallery: int, ks: Sequence[int] = KS) -> Direction | None:
    """Ranks (1 is best) → recalls and median; None when there are none."""
    if len(found) == 0:
        return None
    recalls = {k: int((found <= k).sum()) / len(found) * 100 for k in ks}
    return Direction(recalls, float(statistics.median(found.tolist())), len(found), gallery)


def recall(
    features: SplitFeatures,
    ks: Sequence[int] = KS,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> RetrievalScores:
    """Recall@k both ways over the whole pool, and per language where texts carry one.

    Texts without a known image and images without a text ask no question but stay in the pool. A language's
    scores are those of the split with the texts of that language alone, among all images.
    """
    found = split_ranks(features, memory=memory, device=device)
    scores = _scores(features, found, ks)
    groups = [language or UNLABELLED for language in features.languages]
    if len(set(groups)) > 1:
        for language in sorted(set(groups)):
            mine = torch.tensor([i for i, group in enumerate(groups) if group == language], dtype=torch.int64)
            part = features.with_texts(mine)
            by_image = ranks(part.image_features, part.text_features, part.positives, memory=memory, device=device)
            asked = torch.isin(found.text_index, mine)
            with_text = by_image.nonzero()[:, 0]
            own = SplitRanks(found.text_index[asked], found.text_ranks[asked], with_text, by_image[with_text])
            scores.by_language[language] = _scores(part, own, ks)
    return scores


def _scores(features: SplitFeatures, found: SplitRanks, ks: Sequence[int]) -> RetrievalScores:
    texts, images = len(features.text_ids), len(features.image_ids)
    scores = RetrievalScores(summarise(found.text_ranks, images, ks), summarise(found.image_ranks, texts, ks))
    for direction, query, target, asked, total in (
        ("text→image", "text", "image", len(found.text_index), texts),
        ("image→text", "image", "text", len(found.image_index), images),
    ):
        if asked == 0:
            scores.notes.append(f"{direction} left out: no {query} of the split has a known {target} (no ground truth)")
        elif asked < total:
            scores.notes.append(
                f"{direction}: {total - asked:,} of {total:,} {query}s have no known {target}; they stay in the pool and ask nothing"
            )
    return scores
