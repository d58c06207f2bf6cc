"""WordPiece of many texts at once: each word asked for once, characters that are words by themselves looked up in a table.

BERT's rules cut a text at white space and around Chinese characters and punctuation before anything else, and no rule looks
across such a cut. So the ids of a text are those of its pieces behind one another, and captions are made of few pieces: the
tokenizer, which takes 10 to 20 µs a caption, is asked for a piece when it is met for the first time. Which characters cut is
not written down here: it is what the tokenizer does with them between two letters.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

_BMP = 2**16  # characters above it are asked for with the word they stand in
_UNKNOWN, _INSIDE, _NOTHING = -3, -2, -1  # not met yet; part of a word; cuts and leaves nothing (white space)
_AT_ONCE = 4096  # texts: what bounds the memory of a call
_MOST_WORDS = 2**16  # kept from one call to the next, 150 bytes each
_LETTER = "a"


class Words:
    """Texts → ids.

    Args:
        ids_of: ids of each text, whole and without special tokens.
        around: ids that stand before and behind every text.
        room: ids kept of a text, these two not counted.
    """

    def __init__(self, ids_of: Callable[[Sequence[str]], list[list[int]]], around: tuple[int, int], room: int) -> None:
        self.ids_of, self.around, self.room = ids_of, around, room
        self._characters = np.full(_BMP + 1, _UNKNOWN, np.int32)
        self._characters[_BMP] = _INSIDE
        self._words: dict[str, int] = {}
        self._ids, self._starts = array("q"), array("q", [0])

    def packed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts behind one another, int64, and how many are each text's, int64 ``[texts]``."""
        found = [self._some(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([ids for ids, _ in found]), np.concatenate([lengths for _, lengths in found])

    def _some(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = "\n".join(texts) + "\n"  # cuts, and leaves nothing
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        found = self._look_up(np.minimum(codes, _BMP))
        starts, words = self._words_of(joined, found)
        counts = (found >= 0).astype(np.int64)  # ids by the character they begin at
        begins = np.array(self._starts)
        own = np.diff(begins)[words]
        counts[starts] = own
        ends = np.cumsum(counts)
        ids = np.empty(int(ends[-1]), np.int64)
        single = np.flatnonzero(found >= 0)
        ids[ends[single] - 1] = found[single]
        ids[_runs(ends[starts] - own, own)] = np.array(self._ids)[_runs(begins[words], own)]
        return self._cut(ids, ends[np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1) - 1])

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        found = self._characters[codes]
        if (found == _UNKNOWN).any():
            new = np.unique(codes[found == _UNKNOWN])
            characters = [chr(code) for code in new.tolist()]
            alone = self.ids_of(characters)
            between = self.ids_of([f"{_LETTER}{character}{_LETTER}" for character in characters])
            letter = self.ids_of([_LETTER])[0]
            for code, own, whole in zip(new.tolist(), alone, between, strict=True):
                cuts = len(own) < 2 and whole == [*letter, *own, *letter]
                self._characters[code] = _INSIDE if not cuts else own[0] if own else _NOTHING
            found = self._characters[codes]
        return found

    def _words_of(self, joined: str, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the words begin, and their numbers."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], found == _INSIDE, [False]])))
        starts, ends = edges[::2], edges[1::2]
        words = [joined[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        if len(self._words) > _MOST_WORDS:
            self._words, self._ids, self._starts = {}, array("q"), array("q", [0])
        new = list(dict.fromkeys(word for word in words if word not in self._words))
        for word, ids in zip(new, self.ids_of(new), strict=True):
            self._words[word] = len(self._words)
            self._ids.extend(ids)
            self._starts.append(len(self._ids))
        return starts, np.fromiter(map(self._words.__getitem__, words), np.int64, len(words))

    def _cut(self, ids: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each text's first ids, with those around."""
        starts = np.concatenate([[0], ends[:-1]])
        kept = np.minimum(ends - starts, self.room)
        lengths = kept + 2
        last = np.cumsum(lengths) - 1
        out = np.empty(int(lengths.sum()), np.int64)
        out[last - lengths + 1], out[last] = self.around
        out[_runs(last - kept, kept)] = ids[_runs(starts, kept)]
        return out, lengths


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, …`` of each, behind one another."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
