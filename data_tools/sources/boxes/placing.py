"""A box as it stands in a file → ``[x, y, width, height]`` in shares of the upright picture, or what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_tools.errors import DataFault
from data_tools.sources.boxes.annotated import CENTRE, CORNERS, RawBox

DIGITS = 6  # of a share: a hundredth of a pixel in the largest pictures
_ALIKE = 0.02  # of two shapes: a picture that was shrunk has rounded sides
_MEND = "Mend the box or drop it."


@dataclass(frozen=True)
class Frame:
    """What boxes are divided by, and how they are turned to be those of the upright picture.

    Args:
        width, height: of the upright picture in pixels.
        scale: width and height that the numbers are meant in.
        orientation: 5 to 8 where the numbers are meant in the picture as it is stored, else 1.
    """

    width: int
    height: int
    scale: tuple[float, float]
    orientation: int = 1

    @classmethod
    def of(cls, width: int, height: int, orientation: int, said: tuple[float, float] | None, relative: bool) -> Frame:
        """The frame of a picture of `width` × `height` pixels as it is stored.

        Boxes are those of the upright picture, unless the file states the size that the picture has as it is stored, lying on its
        side. A stated size of the same shape is that of the picture before it was shrunk.

        Raises:
            DataFault: the stated size is another picture's.
        """
        side = orientation in (5, 6, 7, 8)
        own = (height, width) if side else (width, height)
        if relative:
            return cls(*own, (1.0, 1.0))
        if said is None or _alike(said, own):
            return cls(*own, said or own)
        if side and _alike(said, (width, height)):
            return cls(*own, said, orientation)
        raise DataFault(
            f"its boxes are meant in a picture of {said[0]:g}×{said[1]:g} pixels, and it has {own[0]}×{own[1]}",
            mend="Is it the picture that was annotated? Its boxes would lie elsewhere.",
            kind="other-size",
        )

    def place(self, box: RawBox, count: Callable[[str], None]) -> list[float]:
        """The box in shares of the upright picture, rounded; `count` is told ``swapped`` and ``cut``.

        Raises:
            DataFault: it is none: not four numbers, empty, or outside of the picture.
        """
        x, y, to_x, to_y = self._turned(
            [one / scale for one, scale in zip(_corners(box), (*self.scale, *self.scale), strict=True)]
        )
        if to_x < x or to_y < y:
            count("swapped")
            x, y, to_x, to_y = min(x, to_x), min(y, to_y), max(x, to_x), max(y, to_y)
        if not (to_x > x and to_y > y):
            raise _fault(f"the box {_shown(box)} is empty", _MEND)
        if to_x <= 0 or to_y <= 0 or x >= 1 or y >= 1:
            meant = (
                "in shares of the picture"
                if self.scale == (1.0, 1.0)
                else f"in {self.scale[0]:g}×{self.scale[1]:g} pixels"
            )
            raise _fault(
                f"the box {_shown(box)} ({meant}) lies outside of the picture",
                "Are pixels and shares (relative) told apart? " + _MEND,
            )
        if max(-x, to_x - 1) * self.width > 1 or max(-y, to_y - 1) * self.height > 1:
            count("cut")
        if (
            self.scale != (1.0, 1.0)
            and max(to_x * self.scale[0], to_y * self.scale[1]) <= 1
            and self.width * self.height > 1
        ):
            raise _fault(
                f"the box {_shown(box)} lies within one pixel",
                'Write "relative": true where boxes are shares of the picture. ' + _MEND,
            )
        x, y, to_x, to_y = (min(1.0, max(0.0, one)) for one in (x, y, to_x, to_y))
        found = [round(one, DIGITS) for one in (x, y, to_x - x, to_y - y)]
        if not (found[2] > 0 and found[3] > 0):
            raise _fault(f"the box {_shown(box)} is empty", _MEND)
        return found

    def _turned(self, corners: list[float]) -> list[float]:
        """From the picture as it is stored to the upright one (`data_tools.upright`)."""
        x, y, to_x, to_y = corners
        if self.orientation == 5:
            return [y, x, to_y, to_x]
        if self.orientation == 6:
            return [1 - to_y, x, 1 - y, to_x]
        if self.orientation == 7:
            return [1 - to_y, 1 - to_x, 1 - y, 1 - x]
        if self.orientation == 8:
            return [y, 1 - to_x, to_y, 1 - x]
        return corners


def _alike(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return abs(first[0] * second[1] - first[1] * second[0]) <= _ALIKE * first[0] * second[1]


def _corners(box: RawBox) -> list[float]:
    numbers: Any = box.numbers
    if type(numbers) not in (list, tuple) or len(numbers) != 4:
        raise _fault(f"the box {_shown(box)} is not four numbers", _MEND)
    if not all(type(one) in (int, float) and abs(one) < 1e12 and math.isfinite(one) for one in numbers):
        raise _fault(f"the box {_shown(box)} holds what is no number", _MEND)
    x, y, third, fourth = map(float, numbers)
    if box.form == CORNERS:
        return [x, y, third, fourth]
    if box.form == CENTRE:
        return [x - third / 2, y - fourth / 2, x + third / 2, y + fourth / 2]
    return [x, y, x + third, y + fourth]


def _shown(box: RawBox) -> str:
    return f"{box.numbers!r:.60}"


def _fault(problem: str, mend: str) -> DataFault:
    return DataFault(problem, mend=mend, kind="bad-box")
