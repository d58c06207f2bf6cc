"""Which pictures are alike: equal bytes, or a difference hash of nearly all bits (resized, compressed again, a little cropped).

The hash says of 16 × 16 places whether a small grey copy of the picture grows brighter to the right (Krawetz, "Kind of
Like That", 2013, who uses 8 × 8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_tools.errors import DataFault
from data_tools.pictures import open_upright
from data_tools.store import PairStore

SIDE = 16
BITS = SIDE * SIDE
MOST_APART = 12  # bits in which like pictures may differ: two strangers differ in a hundred
_STEP = 2.0  # grey levels of 256 that count as brighter: noise on a white ground does not
_BANDS, _NEAR = 16, 24  # orders the hashes are sorted in, and neighbours each is compared with
_BLANK = 0.08  # share of bits that are set below which a hash says too little to be compared


def difference_hash(data: bytes) -> np.ndarray:
    """``[32]`` uint8: the 256 bits of an encoded picture.

    Raises:
        DataFault: it cannot be decoded.
    """
    picture = open_upright(data, at_least=4 * SIDE).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    grey = np.asarray(picture, np.float32)
    return np.packbits(grey[:, 1:] - grey[:, :-1] > _STEP)


def hashes_of(store: PairStore, workers: int = 2, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(``[images, 32]`` uint8 hashes, ``[images]`` uint64 of the bytes) in the order of `image_ids`."""

    def look(data: bytes) -> tuple[np.ndarray, int]:
        own = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        try:
            return difference_hash(data), own
        except DataFault:
            return np.zeros(BITS // 8, np.uint8), own

    count = store.image_count
    hashes, contents = np.zeros((count, BITS // 8), np.uint8), np.zeros(count, np.uint64)
    bar = tqdm(
        total=count,
        desc=f"{store.name}: looking for like pictures",
        unit="image",
        disable=None if progress else True,
        delay=1.0,
    )
    with bar, ThreadPoolExecutor(max(workers, 1)) as pool:
        at = 0
        for chunk in _chunks((store.image(image_id) for image_id in store.image_ids), 64 * max(workers, 1)):
            for found, own in pool.map(look, chunk):
                hashes[at], contents[at] = found, own
                at += 1
                bar.update()
    return hashes, contents


def _chunks(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def group(hashes: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """``[images]``: the number of the first picture of each one's group. Like pictures share one.

    Every hash is compared with its neighbours in 16 sorted orders, each beginning at another 16 bits: the work grows
    as the number of pictures, and pairs in crowds of like pictures are found by one of them.
    """
    count = len(hashes)
    parent = np.arange(count)

    def top(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    def join(first: np.ndarray, second: np.ndarray) -> None:
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            one, other = top(one), top(other)
            parent[max(one, other)] = min(one, other)

    order = np.argsort(contents, kind="stable")
    same = np.flatnonzero(contents[order][1:] == contents[order][:-1])
    join(order[same], order[same + 1])
    bits = np.unpackbits(hashes, axis=1)
    telling = np.flatnonzero(bits.mean(axis=1) >= _BLANK)
    for band in range(_BANDS):
        rolled = np.roll(hashes[telling], -band * (BITS // 8 // _BANDS), axis=1)
        order = telling[np.lexsort(rolled.T[::-1])] if len(telling) else telling
        for step in range(1, min(_NEAR, len(order) - 1) + 1):
            first, second = order[:-step], order[step:]
            apart = _COUNT[hashes[first] ^ hashes[second]].sum(axis=1)
            near = np.flatnonzero(apart <= MOST_APART)
            join(first[near], second[near])
    return np.array([top(number) for number in range(count)], np.int64)


_COUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint16)
