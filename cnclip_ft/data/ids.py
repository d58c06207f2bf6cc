"""Ids of images and texts, many at once: as numbers of 64 bits, and where they stand in a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from cnclip_ft.data.same_texts import hash_of
from data_tools.arrays import Numbers

_AT_ONCE = 2**16  # ids of a sequence that are held at once
_INT64 = 2**63


class MixedId(NamedTuple):
    """Id of an image or text: the number of its store, from 0, and its id there."""

    store: int
    id: Any


def is_number(value: Any) -> bool:
    """Whether an id is a whole number of 64 bits: what `hashes_of` gives of such ones differs as they do."""
    return type(value) is int and -_INT64 <= value < _INT64


def numbers_of(ids: Sequence[Any]) -> np.ndarray | None:
    """int64 ``[n]``; None where one of them is something else."""
    if not set(map(type, ids)) <= {int}:
        return None
    try:
        return np.fromiter(ids, np.int64, len(ids))
    except OverflowError:
        return None


def hashes_of(ids: Sequence[Any]) -> np.ndarray:
    """uint64 ``[n]``: equal ids give equal ones, whatever stands beside them; different whole numbers give different ones."""
    numbers = numbers_of(ids)
    if numbers is not None:
        return _mixed(numbers.view(np.uint64))
    found = np.empty(len(ids), np.uint64)
    kinds = [2 if type(one) is MixedId else int(is_number(one)) for one in ids]
    for kind in set(kinds):
        places = [place for place, own in enumerate(kinds) if own == kind]
        some = [ids[place] for place in places]
        if kind == 2:
            stores = np.fromiter((one.store for one in some), np.uint64, len(some))
            found[places] = _mixed(hashes_of([one.id for one in some]) + stores)
        elif kind:
            found[places] = hashes_of(some)
        else:
            found[places] = np.fromiter((hash_of(repr(one)) for one in some), np.uint64, len(some))
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """One to one, neighbours far from each other: the last steps of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


class Positions:
    """Where ids stand in a sequence, the last of equal ones: 8 or 16 bytes each, no dictionary of ids."""

    def __init__(self, ids: Sequence[Any]) -> None:
        self.ids = ids
        parts: list[np.ndarray | None] = [ids.values] if isinstance(ids, Numbers) else []
        rest = iter(() if parts else ids)
        while some := list(islice(rest, _AT_ONCE)):
            parts.append(numbers_of(some))
            if parts[-1] is None:
                break
        self.numbers = len(parts) > 0 and parts[-1] is not None
        if not self.numbers:
            parts, rest = [], iter(ids)
            while some := list(islice(rest, _AT_ONCE)):
                parts.append(hashes_of(some))
        held = [part for part in parts if part is not None]
        self._values = held[0] if len(held) == 1 else np.concatenate(held or [np.empty(0, np.uint64)])
        self._order: np.ndarray | None = None
        if (self._values[1:] < self._values[:-1]).any():
            self._order = np.argsort(self._values, kind="stable")
            self._values = self._values[self._order]

    def of(self, wanted: Sequence[Any]) -> np.ndarray:
        """A position each, int64; -1 for an id that is none."""
        numbers = numbers_of(wanted) if self.numbers else None
        if numbers is not None:
            at = np.searchsorted(self._values, numbers, side="right") - 1
            known = (at >= 0) & (self._values[at] == numbers)
            return np.where(known, at if self._order is None else self._order[at], -1)
        asked = list(dict.fromkeys(wanted))
        found = self._numbers_among(asked) if self.numbers else self._by_hashes(asked)
        places = dict(zip(asked, found, strict=True))
        return np.fromiter(map(places.__getitem__, wanted), np.int64, len(wanted))

    def _numbers_among(self, asked: list[Any]) -> list[int]:
        some = [one for one in asked if is_number(one)]
        places = dict(zip(some, self.of(some).tolist(), strict=True))
        return [places.get(one, -1) for one in asked]

    def _by_hashes(self, asked: list[Any]) -> list[int]:
        hashes = hashes_of(asked)
        begins, ends = (np.searchsorted(self._values, hashes, side=side).tolist() for side in ("left", "right"))
        found = []
        for one, begin, end in zip(asked, begins, ends, strict=True):
            places = range(begin, end) if self._order is None else self._order[begin:end].tolist()
            found.append(next((place for place in reversed(places) if self.ids[place] == one), -1))
        return found
