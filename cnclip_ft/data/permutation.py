"""Random orders of any length that are never held: which number stands at a place is computed, for any places at once.

A Feistel network over ``range(a) × range(b)``, a · b just above n, whose numbers beyond n are walked on from (Black and Rogaway, Ciphers
with Arbitrary Finite Domains, 2002). It is for shuffling, not for secrets.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

_ROUNDS = 8
_AT_ONCE = 2**15  # numbers that stay in the processor's cache from round to round
_HALF = np.uint64(32)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio
_MORE = np.uint64(0xD6E8FEB86659FD93)


class Permutation:
    """A permutation of ``range(count)``, another for every `key` (numbers from 0 on; keys of one length)."""

    def __init__(self, count: int, *key: int) -> None:
        self.count = count
        self._high = max(isqrt(max(count - 1, 0)) + 1, 1)
        self._low = max(-(-count // self._high), 1)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.count

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Places int64 ``[n]`` below `count` → the numbers that stand there, int64 ``[n]``."""
        out = np.empty(len(places), dtype=np.int64)
        for start in range(0, len(places), _AT_ONCE):
            part = self._once(places[start : start + _AT_ONCE].astype(np.uint64))
            beyond = np.flatnonzero(part >= self.count)
            while len(beyond):
                part[beyond] = self._once(part[beyond].astype(np.uint64))
                beyond = beyond[part[beyond] >= self.count]
            out[start : start + _AT_ONCE] = part
        return out

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        high, low = np.divmod(numbers, np.uint64(self._low))
        sizes = np.uint64(self._high), np.uint64(self._low)
        for number, key in enumerate(self._keys):
            if number % 2:
                low = _turned(low, high, key, sizes[1])
            else:
                high = _turned(high, low, key, sizes[0])
        return (high * sizes[1] + low).astype(np.int64)


def _turned(own: np.ndarray, other: np.ndarray, key: np.uint64, size: np.uint64) -> np.ndarray:
    """`own` moved on in its circle of `size` by what a hash makes of the other half."""
    mixed = (other ^ key) * _ODD
    mixed ^= mixed >> _HALF
    mixed *= _MORE
    mixed >>= _HALF
    mixed *= size
    mixed >>= _HALF  # below `size`
    mixed += own
    mixed -= size * (mixed >= size)
    return mixed


def uniform(pairs: np.ndarray, others: np.ndarray, step: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Numbers above 0 and below 1, float64 ``[n]``, that look random: a function of each pair, each other number, step and two keys."""
    with np.errstate(over="ignore"):
        found = (pairs.astype(np.uint64) ^ keys[0]) * _ODD
        for more in (others.astype(np.uint64), step ^ keys[1]):
            found = (found ^ (found >> _HALF) ^ more) * _MORE
            found = (found ^ (found >> _HALF)) * _ODD
        found ^= found >> _HALF
    return ((found >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


RUNS = 16  # of a window: from so many places of a store a window's numbers come


def run_length(count: int, window: int) -> int:
    """Numbers of a run, where `window` of `count` are shuffled among themselves."""
    return max(min(window, count) // RUNS, 1)


class InRuns:
    """As `Permutation`, for places that are read in runs: `window` numbers at a time come from few runs of neighbours.

    Runs follow each other in random order; inside a window all its numbers are shuffled.
    """

    def __init__(self, count: int, window: int, *key: int) -> None:
        self.count, self.key = count, key
        self.run = run_length(count, window)
        self.window = self.run * RUNS
        runs = -(-count // self.run)
        self._whole = runs * self.run
        self._runs = Permutation(runs, *key, 1)

    def __len__(self) -> int:
        return self.count

    def __call__(self, places: np.ndarray) -> np.ndarray:
        out = self._once(places)
        beyond = np.flatnonzero(out >= self.count)
        while len(beyond):
            out[beyond] = self._once(out[beyond])
            beyond = beyond[out[beyond] >= self.count]
        return out

    def _once(self, places: np.ndarray) -> np.ndarray:
        windows = places // self.window
        shuffled = np.empty_like(places)
        for number in np.unique(windows).tolist():
            mine, start = windows == number, number * self.window
            size = min(self.window, self._whole - start)
            shuffled[mine] = start + Permutation(size, *self.key, 2 + number)(places[mine] - start)
        run, place = np.divmod(shuffled, self.run)
        return self._runs(run) * self.run + place
