"""What the boxes of a split are like: how many a phrase has, how large they are, and how often each phrase stands there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from data_tools.check.numbers import Spread


@dataclass
class BoxCheck:
    """Boxes of the pairs that have any.

    Args:
        areas: of a box in whole hundredths of the picture. phrases: different texts with boxes.
        most: [phrase, pairs, boxes] of the most frequent. repeated: pairs in which a box stands twice.
        whole: boxes around nearly all of the picture (95 %).
    """

    pairs: int
    boxes: int
    per_pair: Spread | None
    areas: Spread | None
    phrases: int
    most: list[list[Any]]
    repeated: int
    whole: int

    def as_dict(self) -> dict[str, Any]:
        spreads = {name: one and vars(one) for name, one in (("per_pair", self.per_pair), ("areas", self.areas))}
        return {**vars(self), **spreads}


class BoxCounts:
    """Boxes counted one pair after the other."""

    def __init__(self) -> None:
        self._per_pair: Counter[int] = Counter()
        self._areas: Counter[int] = Counter()
        self._pairs: Counter[str] = Counter()
        self._boxes: Counter[str] = Counter()
        self._repeated = self._whole = 0

    def add(self, text: str, boxes: list[list[float]]) -> None:
        self._per_pair[len(boxes)] += 1
        self._pairs[text] += 1
        self._boxes[text] += len(boxes)
        self._repeated += len(set(map(tuple, boxes))) < len(boxes)
        for _, _, width, height in boxes:
            self._areas[round(100 * width * height)] += 1
            self._whole += width * height > 0.95

    def check(self, shown: int) -> BoxCheck | None:
        """None where no pair has boxes."""
        if not self._pairs:
            return None
        return BoxCheck(
            self._pairs.total(),
            self._boxes.total(),
            Spread.of(self._per_pair),
            Spread.of(self._areas),
            len(self._pairs),
            [[text, pairs, self._boxes[text]] for text, pairs in self._pairs.most_common(shown)],
            self._repeated,
            self._whole,
        )
