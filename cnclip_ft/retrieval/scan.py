"""One walk over all scores of two sets of features, tile by tile, for whoever wants to look at them.

A looker is given each tile once: `look` with scores ``[asking, offered]``, `finish` when an asker has met the whole
pool. `sweep` gives the same tile to lookers of both directions, so that text→image and image→text share the
arithmetic. Lookers: `RankLooker` (rank of the best positive), `TopLooker` (the k best, of all or of those that are not
`Barred`), `CountLooker` (how many reach a score).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cnclip_ft.retrieval.tiles import TIE, Side, error_bound, exact, products, tile_shape
from data_tools.bars import Bar

_MARGIN = 4  # candidates kept beyond k, so that rounding seldom asks for a second look


class Looker(Protocol):
    def look(self, scores: torch.Tensor, start: int, first: int) -> None:
        """float32 scores ``[asking, offered]`` of askers from `start` and items from `first`; not to be kept."""

    def finish(self, start: int) -> None:
        """The askers from `start` have met every item."""


def sweep(queries: Side, gallery: Side, rows: Sequence[Looker], columns: Sequence[Looker], memory: int) -> None:
    """Show every score to `rows` (queries ask) and, turned, to `columns` (gallery items ask)."""
    height, width = tile_shape(len(queries), len(gallery), memory, queries.device)
    with Bar(total=len(queries) * len(gallery), desc="scores", unit="", unit_scale=True, delay=2.0) as bar:
        for start, tile in queries.tiles(height):
            for first, part in gallery.tiles(width):
                scores = products(tile, part)
                for looker in rows:
                    looker.look(scores, start, first)
                if columns:
                    turned = scores.T
                    for looker in columns:
                        looker.look(turned, first, start)
                bar.update(scores.numel())
            for looker in rows:
                looker.finish(start)
    for first in range(0, len(gallery), width):
        for looker in columns:
            looker.finish(first)


@dataclass
class Positives:
    """Distinct pairs that belong together, in the order of their askers, with their float64 scores."""

    row: torch.Tensor  # asker
    item: torch.Tensor
    score: torch.Tensor

    @staticmethod
    def of(asking: Side, offered: Side, pairs: torch.Tensor) -> Positives:
        """int64 ``[m, 2]``, (asker, item); repeated rows count once."""
        width = max(len(offered), 1)
        keys = (pairs[:, 0] * width + pairs[:, 1]).unique()
        row, item = (keys // width).to(asking.device), (keys % width).to(asking.device)
        return Positives(row, item, exact(asking, offered, row, item))

    def turned(self) -> Positives:
        """The same pairs seen from the other side."""
        order = self.item.argsort(stable=True)
        return Positives(self.item[order], self.row[order], self.score[order])

    def inside(self, part: slice, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of the pairs within a tile: askers of `part`, `width` items from `first`."""
        limits = torch.tensor([part.start, part.stop], device=self.row.device)
        begin, end = torch.searchsorted(self.row, limits).tolist()
        row, item = self.row[begin:end] - part.start, self.item[begin:end] - first
        here = (item >= 0) & (item < width)
        return row[here], item[here]


class RankLooker:
    """Counts, for every asker, the items that are at least as high as its best positive and none of its own."""

    def __init__(self, asking: Side, offered: Side, positives: Positives) -> None:
        self.asking, self.offered, self.positives = asking, offered, positives
        where, count = asking.device, len(asking)
        scale, row = asking.norms * offered.largest, positives.row
        best = torch.full((count,), -torch.inf, dtype=torch.float64, device=where)
        best.scatter_reduce_(0, row, positives.score, "amax")
        self.asks = torch.zeros(count, dtype=torch.bool, device=where).index_fill_(0, row, True)
        # From here on "at least as high" means this; who has no positive counts nothing.
        self.best = torch.where(self.asks, best - TIE * scale, torch.inf)
        # 2⁻²²·|best| covers the rounding of the two limits themselves to float32.
        bound = error_bound(asking, offered) + 2.0**-22 * best.abs() + TIE * scale
        self.high = torch.where(self.asks, best + bound, torch.inf).float()[:, None]
        self.low = torch.where(self.asks, best - bound, torch.inf).float()[:, None]
        self.above = torch.zeros(count, dtype=torch.int64, device=where)

    def look(self, scores: torch.Tensor, start: int, first: int) -> None:
        part = slice(start, start + len(scores))
        surely, maybe = scores > self.high[part], scores >= self.low[part]
        self.above[part] += surely.sum(1, dtype=torch.int32)
        maybe.logical_xor_(surely)
        own, item = self.positives.inside(part, first, scores.shape[1])
        maybe[own, item] = False  # a positive never is `surely`: none is above the best of them
        at, column = maybe.nonzero(as_tuple=True)
        if len(at) * 16 > scores.numel() and scores.numel() > 2**16:
            # Nearly equal scores everywhere (a collapsed model): a float64 product is cheaper than pairs.
            self.above[part] += (self._float64_hits(part, first, scores.shape[1]) & maybe).sum(1)
        else:
            hits = exact(self.asking, self.offered, at + start, column + first) >= self.best[at + start]
            self.above.index_add_(0, at + start, hits.long())

    def _float64_hits(self, part: slice, first: int, width: int) -> torch.Tensor:
        """bool ``[asking, offered]``: at least as high as the best positive; in slices, as float64 takes twice the room."""
        index = torch.arange(part.start, part.stop, device=self.asking.device)
        wide = self.asking.rows(index)
        hits = torch.empty(len(index), width, dtype=torch.bool, device=wide.device)
        for start in range(0, width, 4096):
            stop = min(start + 4096, width)
            other = self.offered.rows(torch.arange(first + start, first + stop, device=wide.device))
            hits[:, start:stop] = wide @ other.T >= self.best[part][:, None]
        return hits

    def finish(self, start: int) -> None:
        pass  # counts need no last step

    def ranks(self) -> torch.Tensor:
        """int64 ``[asking]`` on the CPU, 1 is best; 0 for those without a positive."""
        return torch.where(self.asks, 1 + self.above, 0).cpu()


class CountLooker:
    """Counts, for every asker, the items whose score is at least `least` (float64 ``[asking]``); decided in float64."""

    def __init__(self, asking: Side, offered: Side, least: torch.Tensor) -> None:
        self.asking, self.offered, self.least = asking, offered, least.to(asking.device)
        bound = error_bound(asking, offered) + 2.0**-22 * self.least.abs()  # the limits are rounded to float32
        self.high, self.low = ((self.least + by).float()[:, None] for by in (bound, -bound))
        self.counts = torch.zeros(len(asking), dtype=torch.int64, device=asking.device)

    def look(self, scores: torch.Tensor, start: int, first: int) -> None:
        part = slice(start, start + len(scores))
        surely = scores > self.high[part]
        self.counts[part] += surely.sum(1)
        at, column = (scores >= self.low[part]).logical_xor_(surely).nonzero(as_tuple=True)
        hits = exact(self.asking, self.offered, at + start, column + first) >= self.least[at + start]
        self.counts.index_add_(0, at + start, hits.long())

    def finish(self, start: int) -> None:
        pass  # counts need no last step


class Barred:
    """What an asker is not to be given: items of its own, and those that score at least `limit` (finite float64 ``[asking]``).

    The limit is decided in float64. `above` counts, for every asker, the items over its limit that are none of its own.
    """

    def __init__(self, asking: Side, offered: Side, own: Positives, limit: torch.Tensor) -> None:
        self.asking, self.offered, self.own, self.limit = asking, offered, own, limit.to(asking.device)
        bound = error_bound(asking, offered) + 2.0**-22 * self.limit.abs()  # the limits are rounded to float32
        self.high, self.low = ((self.limit + by).float()[:, None] for by in (bound, -bound))
        self.above = torch.zeros(len(asking), dtype=torch.int64, device=asking.device)

    def without(self, scores: torch.Tensor, start: int, first: int) -> torch.Tensor:
        """The tile with -inf in place of what is barred; each is to be shown once."""
        part = slice(start, start + len(scores))
        barred, maybe = scores > self.high[part], scores >= self.low[part]
        maybe.logical_xor_(barred)
        row, item = self.own.inside(part, first, scores.shape[1])
        barred[row, item] = maybe[row, item] = False
        at, column = maybe.nonzero(as_tuple=True)
        barred[at, column] = exact(self.asking, self.offered, at + start, column + first) >= self.limit[at + start]
        self.above[part] += barred.sum(1)
        barred[row, item] = True
        return scores.masked_fill(barred, -torch.inf)

    def without_exactly(self, scores: torch.Tensor, asking: torch.Tensor) -> torch.Tensor:
        """The same of some askers, from all their float64 scores."""
        scores = scores.masked_fill(scores >= self.limit[asking][:, None], -torch.inf)
        place = torch.full((len(self.asking),), -1, dtype=torch.int64, device=scores.device)
        place[asking] = torch.arange(len(asking), device=scores.device)
        row = place[self.own.row]
        scores[row[row >= 0], self.own.item[row >= 0]] = -torch.inf
        return scores


class TopLooker:
    """Keeps the k best items of every asker; ties go to the lower index. What is `barred` comes last, with a value of -inf.

    After the sweep `values` (float32) and `indices` (int64), both ``[asking, min(k, offered)]`` on the CPU, are whole.
    The order is exact; a value is its float32 product where that alone decides the order.
    """

    def __init__(self, asking: Side, offered: Side, k: int, memory: int, barred: Barred | None = None) -> None:
        self.asking, self.offered, self.memory, self.barred = asking, offered, memory, barred
        self.k = min(k, len(offered))
        self.keep = min(self.k + _MARGIN, len(offered))
        self.values = torch.empty(len(asking), self.k)
        self.indices = torch.empty(len(asking), self.k, dtype=torch.int64)
        self.bound, self.scale = error_bound(asking, offered), asking.norms * offered.largest
        self.open: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # first asker → scores and items so far

    def look(self, scores: torch.Tensor, start: int, first: int) -> None:
        if self.barred is not None:
            scores = self.barred.without(scores, start, first)
        values, index = _best_of_tile(scores, self.keep)
        index = index + first
        if start in self.open:
            values = torch.cat([self.open[start][0], values], 1)
            index = torch.cat([self.open[start][1], index], 1)
        if values.shape[1] > self.keep:
            top = values.topk(self.keep, dim=1, sorted=False)
            values, index = top.values, index.gather(1, top.indices)
        self.open[start] = values, index

    def finish(self, start: int) -> None:
        if not self.k:
            return
        values, index = self.open.pop(start)
        stop, k = start + len(values), self.k
        asking = torch.arange(start, stop, device=values.device)
        lowest, bound, scale = values.amin(1).double(), self.bound[start:stop], self.scale[start:stop]
        score, order = _settle(self.asking, self.offered, asking, values.double(), index, bound, scale)
        self.values[start:stop], self.indices[start:stop] = score[:, :k].float().cpu(), order[:, :k].cpu()
        if self.keep == len(self.offered):
            return
        # Where something barred is kept, so is all that is not.
        undecided = asking[(lowest + 2 * bound >= score[:, k - 1] - TIE * scale) & lowest.isfinite()]
        if not len(undecided):
            return  # `split` of nothing is one empty part, and a look at the whole gallery in float64
        for rest in undecided.split(max(1, self.memory // (32 * len(self.offered)))):
            score, order = self._look_again(rest)
            self.values[rest.cpu()], self.indices[rest.cpu()] = score.float().cpu(), order.cpu()

    def _look_again(self, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Top-k of some askers from all their float64 scores: for those whose k-th place float32 cannot decide."""
        wide, scale = self.asking.rows(rest), self.scale[rest]
        scores = torch.cat([wide @ part.double().T for _, part in self.offered.tiles(4096)], 1)
        if self.barred is not None:
            scores = self.barred.without_exactly(scores, rest)
        scores = (scores / _grid(scale)[:, None]).round_()
        last = scores.topk(self.k, dim=1).values[:, -1:]
        tied = scores == last
        # Of those that tie for the last places, the first in the gallery's order are taken.
        room = self.k - (scores > last).sum(1, keepdim=True)
        chosen = (scores > last) | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
        found = chosen.nonzero()[:, 1].view(len(rest), self.k)
        everything = torch.full(rest.shape, torch.inf, dtype=torch.float64, device=rest.device)
        return _settle(
            self.asking, self.offered, rest, torch.zeros_like(found, dtype=torch.float64), found, everything, scale
        )


def _best_of_tile(scores: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `keep` best of each row, unordered, with their columns."""
    width = scores.shape[1]
    # Looked at are width / size maxima, then keep · size scores: least work where both are alike.
    size = 1 << max(0, round(math.log2(width / keep) / 2))
    if size < 4:
        top = scores.topk(min(keep, width), dim=1, sorted=False)
        return top.values, top.indices
    # The best `keep` lie in the `keep` blocks with the highest maxima, or in the ragged end. A block is every
    # `blocks`-th column: so maxima are taken of whole runs of memory, several times as fast as within short ones.
    blocks = width // size
    body = scores[:, : blocks * size].unflatten(1, (size, blocks))
    if scores.stride(1) == 1:
        maxima = body.amax(1)
    else:  # turned: the rows lie together
        maxima = body.permute(1, 2, 0).amax(0).T.contiguous()
    chosen = maxima.topk(min(keep, blocks), dim=1, sorted=False).indices
    index = (chosen[:, :, None] + blocks * torch.arange(size, device=scores.device)).flatten(1)
    values = scores.gather(1, index)
    if width > blocks * size:
        values = torch.cat([values, scores[:, blocks * size :]], 1)
        rest = torch.arange(blocks * size, width, device=scores.device).expand(len(scores), -1)
        index = torch.cat([index, rest], 1)
    top = values.topk(keep, dim=1, sorted=False)
    return top.values, index.gather(1, top.indices)


def _grid(scale: torch.Tensor) -> torch.Tensor:
    """float64 scores are rounded to multiples of this before they are put in order, so that equal ones are equal."""
    return (TIE * scale).clamp_min(torch.finfo(torch.float64).tiny)


def _settle(
    asking: Side,
    offered: Side,
    rows: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    bound: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put candidates ``[rows, n]`` in exact order: highest first, equal ones by index.

    Only neighbours closer than twice the bound are scored again: all others cannot change places.
    """
    ordered, place = values.sort(dim=1, descending=True)
    index = index.gather(1, place)
    close = ordered[:, :-1] - ordered[:, 1:] <= 2 * bound[:, None]
    doubtful = torch.zeros_like(ordered, dtype=torch.bool)
    doubtful[:, :-1] |= close
    doubtful[:, 1:] |= close
    if doubtful.shape[1] == 1:
        doubtful.logical_or_(bound.isinf()[:, None])
    row, column = doubtful.nonzero(as_tuple=True)
    ordered[row, column] = exact(asking, offered, rows[row], index[row, column])
    by_index = index.sort(dim=1)
    ordered, index = ordered.gather(1, by_index.indices), by_index.values
    ranked = (ordered / _grid(scale)[:, None]).round().sort(dim=1, descending=True, stable=True).indices
    return ordered.gather(1, ranked), index.gather(1, ranked)
