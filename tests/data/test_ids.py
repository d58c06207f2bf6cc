"""Ids as numbers and their positions, against a dictionary."""

from __future__ import annotations

import random

import numpy as np
import pytest

import cnclip_ft.data.ids as ids_module
from cnclip_ft.data.ids import MixedId, Positions, hashes_of, numbers_of

NUMBERS = [*range(-50, 50), -(2**63), 2**63 - 1, 2**40]
WORDS = [*map(str, range(50)), "图", "0", "x" * 500]
LARGE = [2**63, -(2**70)]  # of a damaged file
MIXED = [MixedId(store, one) for store in (0, 1, 70) for one in (0, 1, 2, "0", "1", 2**63)]
KINDS = {"numbers": NUMBERS, "words": WORDS, "both": [*WORDS, *NUMBERS, *LARGE], "of stores": MIXED}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hash_is_the_ids_own_whatever_stands_beside_it(kind):
    ids = KINDS[kind]
    hashes = hashes_of(ids)
    assert hashes.dtype == np.uint64 and hashes.tolist() == [hashes_of([one])[0] for one in ids]
    assert len(set(hashes.tolist())) == len(set(ids))
    assert hashes_of([]).shape == (0,)


def test_numbers_are_mixed_as_splitmix64_does():
    """The first numbers of the generator with seed 0: its state is a multiple of the constant it adds."""
    step, state, expected = 0x9E3779B97F4A7C15, [], [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for number in range(3):
        value = step * number % 2**64
        state.append(value - 2**64 if value >= 2**63 else value)
    assert hashes_of(state).tolist() == expected


def test_what_is_a_number():
    assert numbers_of([1, 2**63]) is None and numbers_of([1, "1"]) is None and numbers_of([True]) is None
    assert numbers_of([1, -(2**63)]).tolist() == [1, -(2**63)] and numbers_of([]).tolist() == []


@pytest.mark.parametrize("at_once", [2**16, 7])
@pytest.mark.parametrize("order", ["sorted", "shuffled", "twice"])
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_a_dictionary(monkeypatch, kind, order, at_once):
    monkeypatch.setattr(ids_module, "_AT_ONCE", at_once)
    ids, chance = list(KINDS[kind]), random.Random(0)
    if order == "sorted" and kind == "numbers":
        ids.sort()
    if order != "sorted":
        ids = ids * (2 if order == "twice" else 1)
        chance.shuffle(ids)
    held = ids[: -len(ids) // 3]
    known = {one: place for place, one in enumerate(held)}
    positions = Positions(held)
    for wanted in (NUMBERS, WORDS, MIXED, [*ids, *NUMBERS, *WORDS, *LARGE, *MIXED, "none", -7777], ids * 3, []):
        found = positions.of(wanted)
        assert found.dtype == np.int64 and found.tolist() == [known.get(one, -1) for one in wanted]


def test_positions_among_none():
    assert Positions([]).of([1, "1"]).tolist() == [-1, -1]


def test_positions_of_ids_whose_hashes_are_equal(monkeypatch):
    monkeypatch.setattr(ids_module, "hash_of", lambda text: len(text) % 3)
    ids = [*range(40), *map(str, range(40)), "x"]
    assert Positions(ids).of([*ids, 41, "40"]).tolist() == [*range(81), -1, -1]
