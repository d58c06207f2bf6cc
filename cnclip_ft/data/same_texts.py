"""Which pairs carry the same text: found through 64-bit hashes, settled by comparing; no text is held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

_AT_ONCE = 2**20  # hashes that are sorted together, about
_WALKED = 2**22  # hashes looked at together


def hash_of(value: str) -> int:
    """64 bits of a text, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def firsts(
    hashes: np.ndarray, value: Callable[[int], Any] | None, at_once: int = _AT_ONCE
) -> tuple[np.ndarray, np.ndarray]:
    """Places whose value stands at an earlier place, ascending, and for each the first such place; int64 both.

    Args:
        hashes: uint64 ``[n]`` of the values; it may be memory-mapped.
        value: gives the value at a place; asked only where hashes are equal. None: equal hashes are equal values.
    """
    pieces, later, first = max(-(-len(hashes) // at_once), 1), list[int](), list[int]()
    for piece in range(pieces):
        members = [
            start + np.flatnonzero(_piece(np.asarray(hashes[start : start + _WALKED]), pieces) == piece)
            for start in range(0, len(hashes), _WALKED)
        ]
        places = np.concatenate(members) if members else np.empty(0, np.int64)
        held = np.asarray(hashes[places])
        order = np.argsort(held, kind="stable")
        held = held[order]
        begins = np.flatnonzero(np.concatenate([[True], held[1:] != held[:-1]])) if len(held) else np.empty(0, np.int64)
        ends = np.append(begins[1:], len(held))
        if value is None:
            again = np.ones(len(held), bool)
            again[begins] = False
            later += places[order[again]].tolist()
            first += places[order[np.repeat(begins, ends - begins)[again]]].tolist()
            continue
        for begin, end in zip(begins[ends - begins > 1].tolist(), ends[ends - begins > 1].tolist(), strict=True):
            met: dict[Any, int] = {}  # of one hash: one value, but for collisions
            for place in places[order[begin:end]].tolist():
                found = met.setdefault(value(place), place)
                if found != place:
                    later.append(place)
                    first.append(found)
    order = np.argsort(np.array(later, dtype=np.int64))
    return np.array(later, dtype=np.int64)[order], np.array(first, dtype=np.int64)[order]


def _piece(hashes: np.ndarray, pieces: int) -> np.ndarray:
    high = (hashes >> np.uint64(32)) * np.uint64(pieces)
    return (high >> np.uint64(32)).astype(np.int64)


def text_keys(
    count: int, same_id: tuple[np.ndarray, np.ndarray], same_text: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Keys int64 ``[count]``, equal for pairs of one text id or one prepared text, and for what these chain together.

    A pair with neither id nor text of an earlier one has the next number; where a pair joins two numbers, that of its id stays.

    Args:
        same_id, same_text: as `firsts` gives them.
    """
    kind = np.int32 if count < 2**31 else np.int64  # several of them are held at once
    above = np.arange(count, dtype=kind)
    above[same_text[0]] = same_text[1]
    above[same_id[0]] = same_id[1]
    number: np.ndarray = np.cumsum(above == np.arange(count, dtype=kind), dtype=kind)
    number -= 1
    while True:  # from first to first, until it is a pair that began a number
        further = above[above]
        if np.array_equal(further, above):
            break
        above = further
    keys: np.ndarray = number[above].astype(np.int64)
    del above, number
    _, by_id, by_text = np.intersect1d(same_id[0], same_text[0], assume_unique=True, return_indices=True)
    joins = np.stack([keys[same_id[1][by_id]], keys[same_text[1][by_text]]], axis=1)
    root: dict[int, int] = {}

    def found(key: int) -> int:
        while key in root:
            key = root[key]
        return key

    for stays, goes in joins[joins[:, 0] != joins[:, 1]].tolist():
        one, other = found(stays), found(goes)
        if one != other:
            root[other] = one
    if root:
        joined = np.array(sorted(root), dtype=np.int64)
        at = np.minimum(np.searchsorted(joined, keys), len(joined) - 1)
        known = joined[at] == keys
        keys[known] = np.array([found(key) for key in joined.tolist()])[at[known]]
    return keys
