"""Equal texts through hashes against the dictionary that found them before."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest

from cnclip_ft.data.same_texts import TextKeys, firsts, hash_of


class Dictionary:
    """Union of two equalities: the same text id, or the same prepared text (union-find over first sightings)."""

    def __init__(self) -> None:
        self.by_id: dict[int | str, int] = {}
        self.by_text: dict[str, int] = {}
        self.parent = array("q")

    def _root(self, key: int) -> int:
        while self.parent[key] != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def key(self, text_id: int | str, text: str) -> int:
        by_id, by_text = self.by_id.get(text_id), self.by_text.get(text)
        found = by_id if by_id is not None else by_text
        if found is None:
            found = len(self.parent)
            self.parent.append(found)
        elif by_id is not None and by_text is not None:
            self.parent[self._root(by_text)] = self._root(by_id)
        self.by_id[text_id] = self.by_text[text] = found
        return found

    def resolve(self, keys: np.ndarray) -> np.ndarray:
        roots = np.array([self._root(key) for key in range(len(self.parent))], dtype=np.int64)
        return roots[keys] if len(keys) else keys


def drawn(seed: int, ids: int, texts: int) -> list[tuple[int | str, str]]:
    chance = random.Random(seed)
    words = ["", *(f"第 {number} 句" for number in range(texts))]
    named = [*range(ids), *map(str, range(ids))]  # 7 and "7" differ
    return [(chance.choice(named), chance.choice(words)) for _ in range(1000)]


@pytest.mark.parametrize("bits", [64, 8])
@pytest.mark.parametrize("at_once", [2**20, 64])
@pytest.mark.parametrize("ids,texts", [(5000, 5000), (300, 5000), (5000, 300), (700, 600), (30, 30), (1, 1)])
def test_a_thousand_pairs_have_the_keys_of_the_dictionary(bits, at_once, ids, texts):
    pairs = drawn(ids + texts, ids, texts)
    known = Dictionary()
    expected = known.resolve(np.array([known.key(*pair) for pair in pairs]))
    found = []
    for part, write in ((0, repr), (1, str)):
        # Forced to 8 bits, most texts collide; as the high ones, so that pieces are cut too.
        hashes = np.array([hash_of(write(pair[part])) & (2**bits - 1) << 64 - bits for pair in pairs], np.uint64)
        found.append(firsts(hashes, lambda place, part=part: pairs[place][part], at_once))
    keys = TextKeys(len(pairs), *found)
    assert np.array_equal(keys.all(), expected)
    for start, stop in ((0, 1), (1, 300), (300, 301), (500, 500), (999, 1000)):
        assert np.array_equal(keys.block(start, stop), expected[start:stop])


def test_none_and_one():
    for count in (0, 1):
        nothing = firsts(np.zeros(count, np.uint64), lambda place: place)
        assert TextKeys(count, nothing, nothing).all().tolist() == list(range(count))
