"""Which pairs an epoch draws, and in which order they come: by functions of (seed, epoch, place), of one store or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cnclip_ft.data.captions import OneCaption
from cnclip_ft.data.permutation import InRuns, Permutation
from data_tools.errors import RequestError

_MIX = 0  # the stream of a mixture's own shuffles; those of its parts count from 1


class Members:
    """The pairs `start` … `stop` less those `without` (sorted), by their place among them; nothing is held but those."""

    def __init__(self, start: int, stop: int, without: np.ndarray) -> None:
        inside = without[(without >= start) & (without < stop)]
        self.start, self._count = start, stop - start - len(inside)
        self._before = inside - start - np.arange(len(inside))

    def __len__(self) -> int:
        return self._count

    def __call__(self, places: np.ndarray) -> np.ndarray:
        found = places + self.start
        return found + np.searchsorted(self._before, places, side="right") if len(self._before) else found


@dataclass
class Part:
    """What is drawn of one store: of its pairs, or of its pictures with `one` caption each; `count` of them an epoch."""

    name: str
    weight: float
    members: Members
    one: OneCaption | None
    count: int = 0

    def __len__(self) -> int:
        return len(self.members if self.one is None else self.one)

    def units(self) -> np.ndarray:
        """All that may be drawn, int64: pairs, or numbers of pictures."""
        return self.members(np.arange(len(self.members))) if self.one is None else self.one.units

    def shown(self, units: np.ndarray, visit: int) -> np.ndarray:
        """Pairs that are shown where these units are visited for the `visit`-th time."""
        return units if self.one is None else self.one.draw(units, visit)


class Visits:
    """The pairs of every epoch in random order, any stretch of it at once.

    What is drawn of a store goes on through random permutations of its pairs, one behind the other. Of a single store of weight 1 each
    epoch has one of its own; else an epoch draws `weight` times the pairs of a store, less what does not fill a last batch, to the
    nearest pair (`by_store`: to the nearest batch), from where the epoch before ended: no pair is visited again before all have been.

    Where each visit of a picture draws one of its captions, all this is said of pictures.

    Args:
        window: pairs that are read together (`permutation.InRuns`); None: an order that is random altogether.
        key: the stage of the recipe, for messages.

    Raises:
        RequestError: a store that an epoch would never visit, or with fewer pairs than its batch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        batch_size: int,
        seed: int,
        *,
        by_store: bool,
        key: str,
        window: int | None = None,
    ) -> None:
        self.parts, self.seed, self.window = list(parts), seed, window
        self.weighted = len(parts) > 1 or parts[0].weight != 1
        self.by_store = by_store and self.weighted
        if self.weighted:
            self.steps = self._apportion(batch_size, key)
        else:
            self.parts[0].count, self.steps = len(parts[0]), len(parts[0]) // batch_size
        self._last: dict[int, tuple[int, Permutation | InRuns]] = {}
        counts = np.array(self.counts)
        pieces = 1 if window is None else max(round(counts.sum() / window), 1)
        # Of a mixture: how much of every part lies in the first pieces of an epoch, [pieces + 1, parts], and of all.
        self._until = counts * np.arange(pieces + 1)[:, None] // pieces
        self._edges = self._until.sum(1)

    @property
    def counts(self) -> list[int]:
        """Pairs (or pictures) of every store that an epoch draws."""
        return [part.count for part in self.parts]

    def _apportion(self, batch_size: int, key: str) -> int:
        what = "pairs" if self.parts[0].one is None else "pictures"
        wanted = np.array([part.weight * len(part) for part in self.parts])
        steps = int(round(wanted.sum(), 6)) // batch_size
        if steps < 1:
            raise RequestError(
                f"an epoch of data.train visits {wanted.sum():g} {what}, fewer than a batch ({batch_size}): give "
                f"{key}.batch_size={max(int(wanted.sum()), 2)} or less, or larger weights, data.train.N.weight=W"
            )
        unit = batch_size if self.by_store else 1
        counts = unit * _apportioned(wanted, steps * batch_size // unit)
        for part, count in zip(self.parts, counts.tolist(), strict=True):
            part.count = count
            if self.by_store and len(part) < batch_size:
                raise RequestError(
                    f"data.train: {part.name} has {len(part)} {what}, fewer than a batch of it alone ({batch_size}): "
                    f"data.batches=mixed, or {key}.batch_size={max(len(part), 2)} or less"
                )
            if count == 0:
                raise RequestError(
                    f"data.train: {part.name} (weight {part.weight:g}, {len(part)} {what}) is never visited: its share of an epoch is "
                    f"less than half a {'batch' if self.by_store else what[:-1]}. Give it a larger weight, data.train.N.weight=W, or take it out of the list"
                    + (", or data.batches=mixed." if self.by_store else ".")
                )
        return steps

    def of_part(self, number: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Pairs at these places (int64, below `counts`) of what an epoch draws of a store."""
        part = self.parts[number]
        passes, places = np.divmod(epoch * part.count + places, len(part))
        pairs = np.empty_like(places)
        for visit in np.unique(passes).tolist():
            mine = passes == visit
            units = self._permutation(number, visit)(places[mine])
            pairs[mine] = part.members(units) if part.one is None else part.one.draw(units, visit)
        return pairs

    def mixed(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Pairs at these places of what an epoch draws of all stores."""
        if len(self.parts) == 1:
            return self.of_part(0, epoch, places)
        pairs, pieces = np.empty_like(places), np.searchsorted(self._edges, places, side="right") - 1
        for piece in np.unique(pieces).tolist():
            mine, start = pieces == piece, self._edges[piece]
            shuffle = Permutation(int(self._edges[piece + 1] - start), self.seed, _MIX, epoch, piece)
            place = shuffle(places[mine] - start)
            sizes = self._until[piece + 1] - self._until[piece]
            ends = sizes.cumsum()
            parts = np.searchsorted(ends, place, side="right")
            place += self._until[piece][parts] - (ends - sizes)[parts]
            found = np.empty_like(place)
            for number in np.unique(parts).tolist():
                own = parts == number
                found[own] = self.of_part(number, epoch, place[own])
            pairs[mine] = found
        return pairs

    def _permutation(self, number: int, visit: int) -> Callable[[np.ndarray], np.ndarray]:
        held = self._last.get(number)
        if held is None or held[0] != visit:
            size, key = len(self.parts[number]), (self.seed, 1 + number, visit)
            held = visit, Permutation(size, *key, 0) if self.window is None else InRuns(size, self.window, *key)
            self._last[number] = held
        return held[1]


def _apportioned(wanted: np.ndarray, total: int) -> np.ndarray:
    """`total` in whole numbers, as near to the shares of `wanted` as can be (largest remainders)."""
    exact = wanted * total / wanted.sum()
    counts = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[most] += 1
    return counts
