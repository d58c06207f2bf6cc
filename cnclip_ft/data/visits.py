"""How often an epoch of several stores visits each, and which of its pairs: by a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnclip_ft.data.captions import OneCaption
from cnclip_ft.data.pairs import Span
from data_tools.errors import RequestError


class Visits:
    """Which pairs of every store an epoch draws.

    An epoch draws `weight` times the pairs of a store, less what does not fill a last batch, to the nearest pair (`by_store`:
    to the nearest batch). What is drawn goes on through random permutations of the store's pairs, one behind the other,
    from epoch to epoch: no pair is visited again before all have been.

    Where each visit of a picture draws `one` of its captions, all this is said of pictures.

    Args:
        pairs: of every span, those that may be drawn; or with `one` the numbers of its pictures.
        key: the stage of the recipe, for messages.

    Raises:
        RequestError: a store that an epoch would never visit, or with fewer pairs than its batch.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        pairs: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
        *,
        by_store: bool,
        key: str,
        one: Sequence[OneCaption] = (),
    ) -> None:
        self.one, what = one, "pictures" if one else "pairs"
        self.pairs, self.batch_size, self.seed, self.by_store = list(pairs), batch_size, seed, by_store
        wanted = np.array([span.weight * len(mine) for span, mine in zip(spans, pairs, strict=True)])
        self.steps = int(round(wanted.sum(), 6)) // batch_size
        if self.steps < 1:
            raise RequestError(
                f"an epoch of data.train visits {wanted.sum():g} {what}, fewer than a batch ({batch_size}): give "
                f"{key}.batch_size={max(int(wanted.sum()), 2)} or less, or larger weights, data.train.N.weight=W"
            )
        unit = batch_size if by_store else 1
        self.counts = unit * _apportioned(wanted, self.steps * batch_size // unit)
        for span, mine, count in zip(spans, pairs, self.counts, strict=True):
            if by_store and len(mine) < batch_size:
                raise RequestError(
                    f"data.train: {span.name} has {len(mine)} {what}, fewer than a batch of it alone ({batch_size}): "
                    f"data.batches=mixed, or {key}.batch_size={max(len(mine), 2)} or less"
                )
            if count == 0:
                raise RequestError(
                    f"data.train: {span.name} (weight {span.weight:g}, {len(mine)} {what}) is never visited: its share of an epoch is "
                    f"less than half a {'batch' if by_store else what[:-1]}. Give it a larger weight, data.train.N.weight=W, or take it out of the list"
                    + (", or data.batches=mixed." if by_store else ".")
                )

    @property
    def repeats(self) -> bool:
        """Whether an epoch may hold a pair, or a picture of which one caption is drawn, twice."""
        return any(
            count > len(mine) or self._offset(part, 1)
            for part, (count, mine) in enumerate(zip(self.counts, self.pairs, strict=True))
        )

    def _offset(self, part: int, epoch: int) -> int:
        return int(epoch * self.counts[part] % len(self.pairs[part]))

    def epoch(self, epoch: int, random: np.random.Generator) -> list[np.ndarray]:
        """Pairs in random order, whole batches of them each: all together, or those of every store."""
        drawn = [self._drawn(part, epoch) for part in range(len(self.pairs))]
        return drawn if self.by_store else [random.permutation(np.concatenate(drawn))]

    def _drawn(self, part: int, epoch: int) -> np.ndarray:
        pairs, count = self.pairs[part], int(self.counts[part])
        first, begin = divmod(epoch * count, len(pairs))
        last = (epoch * count + count - 1) // len(pairs)
        # The last number tells these draws from those of the whole epoch, which are seeded by two.
        passes = [
            np.random.default_rng([self.seed, each, part + 1]).permutation(pairs) for each in range(first, last + 1)
        ]
        if self.one:
            passes = [self.one[part].draw(units, each) for each, units in enumerate(passes, first)]
        return np.concatenate(passes)[begin : begin + count]


def _apportioned(wanted: np.ndarray, total: int) -> np.ndarray:
    """`total` in whole numbers, as near to the shares of `wanted` as can be (largest remainders)."""
    exact = wanted * total / wanted.sum()
    counts = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[most] += 1
    return counts
