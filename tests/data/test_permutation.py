"""Orders that are computed, not held: each number once, any place by itself, as likely as the others."""

from __future__ import annotations

import numpy as np
import pytest

from cnclip_ft.data.permutation import RUNS, InRuns, Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 103, 65_537])
def test_every_number_stands_at_one_place(count):
    for make in (Permutation, lambda n, *key: InRuns(n, 50, *key), lambda n, *key: InRuns(n, 1000, *key)):
        order = make(count, 1, 2)
        whole = order(np.arange(count))
        assert np.array_equal(np.sort(whole), np.arange(count))
        places = np.random.default_rng(0).integers(0, count, 20)
        assert np.array_equal(order(places), whole[places])  # any place by itself
        assert count < 7 or not np.array_equal(whole, make(count, 1, 3)(np.arange(count)))


@pytest.mark.parametrize("count", [3, 4, 7, 12, 40])
@pytest.mark.parametrize("make", [Permutation, lambda n, *key: InRuns(n, 16, *key)])
def test_every_number_is_as_likely_at_every_place(count, make):
    """Chi-square over 2,000 keys, below the value that one in ten thousand exceeds; of places, and of what stands side by side."""
    drawn = np.stack([make(count, 7, key)(np.arange(count)) for key in range(2000)])
    places = np.stack([np.bincount(drawn[:, place], minlength=count) for place in range(count)])
    assert chi_square(places) < limit((count - 1) ** 2)
    if make is Permutation:
        beside = np.bincount(drawn[:, 0] * count + drawn[:, 1], minlength=count * count).reshape(count, count)
        assert chi_square(beside[~np.eye(count, dtype=bool)]) < limit(count * (count - 1) - 1)


def chi_square(counts: np.ndarray) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def limit(freedom: int) -> float:
    """The value of chi-square that 1 in 10,000 exceeds (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.719 * spread**0.5) ** 3


def test_runs_are_read_one_behind_the_other():
    order = InRuns(100_000, 1600, 3, 4)
    assert order.run == 100
    whole = order(np.arange(100_000))
    for start in range(0, 96_000, 1600):
        window = whole[start : start + 1600]
        assert (
            len(np.unique(window // 100)) <= RUNS + 1
        )  # all of some runs; the last one's rest is filled up from elsewhere
        assert np.abs(np.diff(window)).mean() > 1000  # and shuffled among themselves
    assert np.abs(np.diff(np.unique(whole[:1600] // 100))).max() > 10  # runs from everywhere
