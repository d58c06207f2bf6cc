"""Further captions of a pair's picture, shown in the same step: which ones, by a function of (seed, step, pair)."""

from __future__ import annotations

import numpy as np

from cnclip_ft.data.pairs import PairTable
from cnclip_ft.data.permutation import uniform
from data_tools.errors import RequestError
from data_tools.words import Said

_LOOKED_AT = 256  # captions of a picture among which a step draws


class FurtherCaptions:
    """`count` captions of the picture of any pair: its own first, the others drawn anew in every step.

    Captions of a picture are different ones as far as it has so many; a picture with fewer shows some of them again. Where the
    table has weights the others are drawn by them (Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006).
    A mixture's pictures are one where its stores have the same id and bytes, and so are their captions.

    Args:
        seed: another one for every stage.
        key: the setting, for messages.

    Raises:
        RequestError: no picture has more than one caption.
    """

    def __init__(self, table: PairTable, count: int, seed: int, key: str) -> None:
        self.table, self.count = table, count
        self._keys = np.random.SeedSequence([seed, count]).generate_state(2, np.uint64)
        self._by_image = table.by_image()
        captions = np.diff(self._by_image[1])
        self.mean, self.most = len(table) / int(np.count_nonzero(captions)), int(captions.max())
        if not (captions > 1).any():
            raise RequestError(
                f"{key}={count}: none of the {len(table):,} pictures of data.train has a second caption. Give {key}=1"
            )

    def draw(self, pairs: np.ndarray, step: int) -> np.ndarray:
        """Pairs int64 ``[n]`` → captions int64 ``[n, count]``, numbers of pairs that show the same picture."""
        order, starts = self._by_image
        images, turn = self.table.image_keys[pairs], np.uint64(step)
        counts = starts[images + 1] - starts[images]
        # Of very many captions a run of some, from a place of its own in every step
        begins = (uniform(pairs, pairs, turn, self._keys[::-1]) * counts).astype(np.int64) * (counts > _LOOKED_AT)
        sizes = np.minimum(counts, _LOOKED_AT)
        ends = sizes.cumsum()
        row = np.repeat(np.arange(len(pairs)), sizes)
        place = np.arange(len(row)) - np.repeat(ends - sizes, sizes)
        others = order[starts[images][row] + (begins[row] + place) % counts[row]]
        own = others == pairs[row]
        absent = np.flatnonzero(np.bincount(row[own], minlength=len(pairs)) == 0)
        others[ends[absent] - 1], own[ends[absent] - 1] = pairs[absent], True
        chance = uniform(pairs[row], others, turn, self._keys)
        if self.table.weights is not None:
            # -log(u) / w, the smallest first, is a draw by the weights, one after the other; its logarithm lies between -750 and
            # 750 whatever the weights
            with np.errstate(divide="ignore"):
                found = np.log(-np.log(chance)) - np.log(self.table.weights[others])
            chance = np.minimum((found + 750) / 1500, 1.0)
        others = others[np.argsort(row + np.where(own, 0.0, 0.25 + chance / 2))]  # its own is the first
        shown: np.ndarray = others[np.arange(self.count) % sizes[:, None] + (ends - sizes)[:, None]]
        return shown

    def describe(self) -> Said:
        """The line of the plan."""
        return Said(
            "    each pair brings {count} captions of its picture into a step, its own first (a picture has {mean:.3g} on average): the picture "
            "goes through its tower once",
            "    每对在一步中带上其图片的 {count} 条文本，首先是自己的一条（一张图片平均有 {mean:.3g} 条）；图片只过一次图像塔",
            count=self.count,
            mean=self.mean,
        )
