"""Heat maps: how much every place of a picture has to do with a phrase, and the regions that have most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

Box = tuple[float, float, float, float]
"""``(x, y, width, height)`` in shares of the upright picture, x and y the upper left corner."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_FINE = 192  # cells along the longer side of a map in which regions are looked for: a box's edge lies within a 200th of the picture


@dataclass(frozen=True)
class Region:
    """
    Args:
        box: around it.
        score: of its hottest place.
    """

    box: Box
    score: float


@dataclass(frozen=True)
class Heat:
    """
    Args:
        values: float32 ``[rows, columns]``, a cosine for every patch.
        part: what of the upright picture they lie over. Beyond it nothing was seen.
    """

    values: np.ndarray
    part: Box = WHOLE

    @property
    def score(self) -> float:
        """Of the hottest place."""
        return float(self.values.max())

    @property
    def hottest(self) -> list[Box]:
        """The hottest patch, in shares of the upright picture; all of them where several are equal."""
        rows, columns = self.values.shape
        x, y, width, height = self.part
        tall, wide = height / rows, width / columns
        return [
            (x + int(column) * wide, y + int(row) * tall, wide, tall)
            for row, column in np.argwhere(self.values == self.values.max())
        ]

    @property
    def point(self) -> tuple[float, float]:
        """The middle of the hottest patch, of several the first one, in shares of the upright picture."""
        x, y, width, height = self.hottest[0]
        return x + width / 2, y + height / 2

    @cached_property
    def _fine(self) -> np.ndarray:
        """The same in more cells, smoothly."""
        rows, columns = self.values.shape
        times = max(1, -(-_FINE // max(rows, columns)))
        return _resized(self.values, rows * times, columns * times)

    def regions(self, threshold: float, most: int = 100) -> list[Region]:
        """Connected regions, the hottest first, of what lies above `threshold` of the way from the coldest place to the hottest.

        Cosines have no zero that means nothing: the coldest place stands for it. A map that is the same everywhere is one region.

        Args:
            threshold: 0 to 1.
            most: of so many.
        """
        fine = self._fine
        low, high = float(fine.min()), float(fine.max())
        labels = connected(fine >= low + threshold * (high - low))
        count, (rows, columns) = int(labels.max()), fine.shape
        x, y, width, height = self.part
        found = []
        for top, left, bottom, right, label in _extents(labels, count):
            box = (
                x + width * left / columns,
                y + height * top / rows,
                width * (right - left) / columns,
                height * (bottom - top) / rows,
            )
            inside = fine[top:bottom, left:right][labels[top:bottom, left:right] == label]
            found.append(Region(box, float(inside.max())))
        return sorted(found, key=lambda region: -region.score)[:most]

    def over(self, width: int, height: int) -> np.ndarray:
        """float32 ``[height, width]``, for a picture of so many pixels: 0 at the coldest place to 1 at the hottest; nan where
        nothing was seen. A map that is the same everywhere is 0."""
        x, y, wide, tall = self.part
        left, top = round(x * width), round(y * height)
        right, bottom = max(left + 1, round((x + wide) * width)), max(top + 1, round((y + tall) * height))
        low, high = float(self.values.min()), float(self.values.max())
        scaled = (self.values - low) / (high - low) if high > low else np.zeros_like(self.values)
        whole = np.full((height, width), np.nan, np.float32)
        whole[top:bottom, left:right] = _resized(scaled, bottom - top, right - left)[: height - top, : width - left]
        return whole


def heats(
    features: torch.Tensor,
    rows: int,
    columns: int,
    phrases: torch.Tensor,
    part: Box = WHOLE,
    seen: tuple[float, float] = (1.0, 1.0),
) -> list[Heat]:
    """A map for every phrase, of one picture.

    Args:
        features: unit ``[rows · columns, dim]``.
        phrases: unit ``[phrases, dim]``.
        part: what the tower sees of the upright picture (`Preprocessing.part`).
        seen: share of the tower's height and width that the patches cover (`models.dense.Patches`).
    """
    x, y, width, height = part
    cosines = (phrases.to(features) @ features.mT).float().cpu().numpy().reshape(-1, rows, columns)
    return [Heat(one, (x, y, width * seen[1], height * seen[0])) for one in cosines]


def connected(mask: np.ndarray) -> np.ndarray:
    """Regions of a bool ``[rows, columns]`` by number, from 1 on, 0 elsewhere; places that touch with a side are one.

    In runs of a row that are joined with those above: what scipy's `label` does, without scipy.
    """
    rows, columns = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    runs = [(int(row), int(start), int(end)) for (row, start), (_, end) in zip(starts, ends, strict=True)]
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for number, (row, start, end) in enumerate(runs):
        while above < number and (runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start)):
            above += 1
        other = above
        while other < number and runs[other][0] == row - 1 and runs[other][1] < end:
            one, two = root(number), root(other)
            parent[max(one, two)] = min(one, two)
            other += 1
    labels = np.zeros((rows, columns), np.int32)
    names: dict[int, int] = {}
    for number, (row, start, end) in enumerate(runs):
        labels[row, start:end] = names.setdefault(root(number), len(names) + 1)
    return labels


def _extents(labels: np.ndarray, count: int) -> list[tuple[int, int, int, int, int]]:
    """Top, left, bottom, right (the last two behind it) and number of every region."""
    rows, columns = np.nonzero(labels)
    own = labels[rows, columns]
    found = []
    for reduce, values, empty in ((np.minimum, (rows, columns), labels.size), (np.maximum, (rows + 1, columns + 1), 0)):
        for value in values:
            into = np.full(count + 1, empty, np.int64)
            reduce.at(into, own, value)
            found.append(into)
    top, left, bottom, right = found
    return [(int(top[n]), int(left[n]), int(bottom[n]), int(right[n]), n) for n in range(1, count + 1)]


def _resized(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear between the middles of patches; beyond the outer ones as they are."""
    given = torch.from_numpy(values)[None, None]
    return F.interpolate(given, size=(rows, columns), mode="bilinear", align_corners=False)[0, 0].numpy()
