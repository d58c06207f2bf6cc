"""Which pictures are alike: equal bytes, or the same picture in another size or quality, or a little cropped.

What is compared is a copy of 8 × 8 colours. Neighbours are found by random hyperplanes (Charikar, "Similarity Estimation
Techniques from Rounding Algorithms", 2002), in time that grows as the number of pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image

from data_tools.bars import Bar
from data_tools.errors import DataFault
from data_tools.pictures import open_upright
from data_tools.store import PairSource

SIDE = 8
# Mean difference of two copies in parts of their own mean contrast. Measured: 0.02 to 0.09 for the same picture at half
# the size and a quality of 50, 0.17 and more for different goods on white.
MOST_APART = 0.11
_LEAST_CONTRAST = 1.5  # levels of 256; below, a picture is one colour and says nothing
_BITS, _ORDERS, _NEAR = 256, 8, 16  # hyperplanes, sorted orders, neighbours each is compared with in one
_AT_ONCE = 65536


def small_copy(data: bytes) -> np.ndarray:
    """``[8, 8, 3]`` uint8 of an encoded picture.

    Raises:
        DataFault: it cannot be decoded.
    """
    return np.asarray(open_upright(data, at_least=8 * SIDE).resize((SIDE, SIDE), Image.Resampling.BOX))


def copies_of(store: PairSource, workers: int = 2, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(``[images, 8, 8, 3]`` uint8, ``[images]`` uint64 hashes of the bytes) in the order of `image_ids`."""

    def look(data: bytes) -> tuple[np.ndarray | int, int]:
        own = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        try:
            return small_copy(data), own
        except DataFault:
            return 0, own  # one colour: like those of equal bytes only

    count, at = store.image_count, 0
    copies, contents = np.zeros((count, SIDE, SIDE, 3), np.uint8), np.zeros(count, np.uint64)
    bar = Bar(total=count, desc=f"{store.name}: small copies", unit="image", shown=progress, delay=1.0)
    with bar, ThreadPoolExecutor(max(workers, 1)) as pool:
        for chunk in _chunks((store.image(image_id) for image_id in store.image_ids), 64 * max(workers, 1)):
            for copy, own in pool.map(look, chunk):
                copies[at], contents[at] = copy, own
                at += 1
            bar.update(len(chunk))
    return copies, contents


def _chunks(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


class Groups:
    """Numbers from 0 in groups, each by itself at first (union-find)."""

    def __init__(self, count: int) -> None:
        self._before = list(range(count))

    def _first(self, number: int) -> int:
        before = self._before
        while before[number] != number:
            before[number] = number = before[before[number]]
        return number

    def join(self, some: np.ndarray, others: np.ndarray) -> None:
        """Put each of `some` (int64 ``[n]``) and its counterpart into one group."""
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            one, other = self._first(one), self._first(other)
            self._before[max(one, other)] = min(one, other)

    def firsts(self) -> np.ndarray:
        """int64: the smallest number of each one's group."""
        return np.array([self._first(number) for number in range(len(self._before))], np.int64)


def same_picture(first: bytes, second: bytes) -> bool:
    """Whether two encoded pictures are alike; one that cannot be decoded is like equal bytes only."""
    if first == second:
        return True
    try:
        copies = np.stack([small_copy(first), small_copy(second)])
    except DataFault:
        return False
    contrast = float(_contrast(copies).max())
    apart = float(np.abs(copies[0].astype(np.int16) - copies[1]).mean())
    return contrast >= _LEAST_CONTRAST and apart <= MOST_APART * contrast


def group(copies: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """``[images]``: the number of the first picture of each one's group. Like pictures share one.

    Args:
        copies: ``[images, 8, 8, 3]`` uint8. contents: ``[images]``, equal for equal bytes.
    """
    groups = Groups(len(copies))
    order = np.argsort(contents, kind="stable")
    same = np.flatnonzero(contents[order][1:] == contents[order][:-1])
    groups.join(order[same], order[same + 1])
    contrast = _contrast(copies)
    telling = np.flatnonzero(contrast >= _LEAST_CONTRAST)
    hashes = _hashes(copies[telling], contrast[telling])
    for turn in range(_ORDERS):
        rolled = np.roll(hashes, -turn * (_BITS // 8 // _ORDERS), axis=1)
        order = telling[np.lexsort(rolled.T[::-1])] if len(telling) else telling
        for step in range(1, min(_NEAR, len(order) - 1) + 1):
            for begin in range(0, len(order) - step, _AT_ONCE):
                first, second = order[begin : begin + _AT_ONCE], order[begin + step : begin + step + _AT_ONCE]
                first = first[: len(second)]
                apart = np.abs(copies[first].astype(np.int16) - copies[second]).mean(axis=(1, 2, 3))
                near = apart <= MOST_APART * np.maximum(contrast[first], contrast[second])
                groups.join(first[near], second[near])
    return groups.firsts()


def _contrast(copies: np.ndarray) -> np.ndarray:
    """``[images]``: mean distance of a copy's values from their mean colour."""
    found = np.empty(len(copies), np.float32)
    for begin in range(0, len(copies), _AT_ONCE):
        some = copies[begin : begin + _AT_ONCE].astype(np.float32)
        found[begin : begin + _AT_ONCE] = np.abs(some - some.mean(axis=(1, 2), keepdims=True)).mean(axis=(1, 2, 3))
    return found


def _hashes(copies: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """``[images, 32]`` uint8: on which side of 256 hyperplanes through the mean picture each lies."""
    planes = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, _BITS)).astype(np.float32)
    found, middle = np.empty((len(copies), _BITS // 8), np.uint8), np.zeros(SIDE * SIDE * 3, np.float32)

    def even(begin: int) -> np.ndarray:
        some = copies[begin : begin + _AT_ONCE].astype(np.float32)
        some -= some.mean(axis=(1, 2), keepdims=True)
        return some.reshape(len(some), -1) / contrast[begin : begin + _AT_ONCE, None]

    for begin in range(0, len(copies), _AT_ONCE):
        middle += even(begin).sum(axis=0)
    middle /= max(len(copies), 1)
    for begin in range(0, len(copies), _AT_ONCE):
        found[begin : begin + _AT_ONCE] = np.packbits((even(begin) - middle) @ planes > 0, axis=1)
    return found
