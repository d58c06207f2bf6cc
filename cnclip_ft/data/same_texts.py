"""Which pairs carry the same text: found through 64-bit hashes, settled by comparing; no text is held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

_AT_ONCE, _PIECES = (
    2**17,
    64,
)  # hashes that are sorted together, about; more of them where that would be more pieces, each a walk over all
_WALKED = 2**16  # hashes looked at together


def hash_of(value: str) -> int:
    """64 bits of a text, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def firsts(
    hashes: np.ndarray, value: Callable[[int], Any] | None, at_once: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Places whose value stands at an earlier place, ascending, and for each the first such place; int64 both.

    Args:
        hashes: uint64 ``[n]`` of the values; it may be memory-mapped.
        value: gives the value at a place; asked only where hashes are equal. None: equal hashes are equal values.
    """
    pieces = max(-(-len(hashes) // (at_once or max(_AT_ONCE, len(hashes) // _PIECES))), 1)
    found: list[np.ndarray] = []  # [later, first] of every piece
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
            found.append(places[np.stack([order[again], order[np.repeat(begins, ends - begins)[again]]])])
            continue
        pairs = list[tuple[int, int]]()
        for begin, end in zip(begins[ends - begins > 1].tolist(), ends[ends - begins > 1].tolist(), strict=True):
            met: dict[Any, int] = {}  # of one hash: one value, but for collisions
            for place in places[order[begin:end]].tolist():
                known = met.setdefault(value(place), place)
                if known != place:
                    pairs.append((place, known))
        found.append(np.array(pairs, np.int64).reshape(-1, 2).T)
    later, first = np.concatenate(found, axis=1)
    order = np.argsort(later)
    return later[order], first[order]


def _piece(hashes: np.ndarray, pieces: int) -> np.ndarray:
    high = (hashes >> np.uint64(32)) * np.uint64(pieces)
    return (high >> np.uint64(32)).astype(np.int64)


class TextKeys:
    """Keys int64, equal for pairs of one text id or one prepared text, and for what these chain together.

    A pair with neither id nor text of an earlier one has the next number; where a pair joins two numbers, that of its id stays. What is
    held grows with the pairs that repeat something, not with all.

    Args:
        count: pairs.
        same_id, same_text: as `firsts` gives them.
    """

    def __init__(
        self, count: int, same_id: tuple[np.ndarray, np.ndarray], same_text: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.count = count
        places, at = np.unique(np.concatenate([same_id[0], same_text[0]]), return_index=True)  # the first, so the id's
        self._later = places.astype(np.int64)
        first = np.concatenate([same_id[1], same_text[1]])[at].astype(np.int64)
        while True:  # from first to first, until it is a pair that began a number
            where, repeats = self._look(first)
            further = np.where(repeats, first[where], first) if len(first) else first
            if np.array_equal(further, first):
                break
            first = further
        self._keys = first - np.searchsorted(self._later, first)  # of the pairs at `_later`
        self._joined = self._goes = np.empty(0, np.int64)
        _, by_id, by_text = np.intersect1d(same_id[0], same_text[0], assume_unique=True, return_indices=True)
        self._join(self._numbers(same_id[1][by_id]), self._numbers(same_text[1][by_text]))

    def _look(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where places stand in `_later`, and whether they do."""
        where = np.minimum(np.searchsorted(self._later, places), max(len(self._later) - 1, 0))
        return where, self._later[where] == places if len(self._later) else np.zeros(len(places), bool)

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        where, repeats = self._look(places)
        numbers = places - np.searchsorted(self._later, places)
        return np.where(repeats, self._keys[where], numbers) if len(self._later) else numbers

    def _join(self, stay: np.ndarray, go: np.ndarray) -> None:
        root: dict[int, int] = {}

        def found(key: int) -> int:
            while key in root:
                key = root[key]
            return key

        differ = stay != go
        for stays, goes in zip(stay[differ].tolist(), go[differ].tolist(), strict=True):
            one, other = found(stays), found(goes)
            if one != other:
                root[other] = one
        self._joined = np.array(sorted(root), np.int64)
        self._goes = np.array([found(key) for key in self._joined.tolist()], np.int64)

    def block(self, start: int, stop: int) -> np.ndarray:
        """Keys of the pairs from `start` to before `stop`."""
        first, last = np.searchsorted(self._later, [start, stop])
        own = self._later[first:last] - start
        keys = np.arange(start, stop, dtype=np.int64)
        keys -= first
        keys -= np.bincount(own, minlength=stop - start).cumsum()
        keys[own] = self._keys[first:last]
        if len(self._joined):
            at = np.minimum(np.searchsorted(self._joined, keys), len(self._joined) - 1)
            keys = np.where(self._joined[at] == keys, self._goes[at], keys)
        return keys

    def all(self) -> np.ndarray:
        """Keys ``[count]``."""
        return self.block(0, self.count)
