"""A store's pairs: texts tokenised once per run, and pictures decoded on demand, as a torch data set."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cnclip_ft.data.mixture import Mixture, check_lines, name_image
from cnclip_ft.data.pictures import Pictures, data_fault
from cnclip_ft.models.contract import Preprocessing, Tokenizer
from data_tools.errors import DataFault
from data_tools.language import detect_language

if TYPE_CHECKING:
    from data_tools.store import PairSource

_TEXTS_AT_ONCE = 8192


@dataclass(frozen=True)
class Span:
    """Pairs `start` … `stop` of a table, those of one store, which an epoch visits `weight` times."""

    name: str
    start: int
    stop: int
    weight: float = 1.0

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass
class PairTable:
    """All pairs of a store without their pictures, about 60 bytes a pair.

    `image_keys` and `text_keys` are int64 ``[pairs]``. Pairs with equal image keys show the same image, pairs
    with equal text keys carry the same text id or the same prepared text: they are not negatives of each other.
    An image key is the image's position in `store.image_ids`. `spans` are the stores of a mixture, none of a single store;
    `languages` counts pairs by the language they say, "" for none; `spoken` by that and, where there is none, by their letters. `tokens` holds all token ids behind one another,
    those of pair i at ``starts[i]:starts[i + 1]``. With `weights`, float64 ``[pairs]``, an epoch draws one caption a picture by
    them (`data.captions`).
    """

    image_keys: np.ndarray
    text_keys: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray
    cut: int  # texts longer than the context length
    spans: tuple[Span, ...] = ()
    languages: Counter[str] = field(default_factory=Counter)
    spoken: Counter[str] = field(default_factory=Counter)
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def token_ids(self, pair: int) -> np.ndarray:
        return self.tokens[self.starts[pair] : self.starts[pair + 1]]

    def batch(self, pairs: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Texts of `pairs`, padded as the tokenizer does (where that is to the longest, to one of `lengths`), keys, and the numbers of
        the pairs; all int64."""
        ids = [self.token_ids(pair) for pair in pairs.tolist()]
        free = lengths and tokenizer.padding == "longest"
        input_ids, attention_mask = tokenizer.pad(ids, padded_length(max(map(len, ids)), lengths) if free else None)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_keys": torch.from_numpy(self.image_keys[pairs]),
            "text_keys": torch.from_numpy(self.text_keys[pairs]),
            "pairs": torch.from_numpy(pairs),
        }


def fixed_lengths(context_length: int) -> tuple[int, ...]:
    """Few lengths, each at most a half above the one before: 16, 24, 32, 48, … and the longest."""
    steps = [base << power for power in range(9) for base in (16, 24)]
    return (*(length for length in steps if length < context_length), context_length)


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """The first of `lengths` that is enough; `longest` itself where there are none."""
    return next(length for length in lengths if length >= longest) if lengths else longest


class TextKeys:
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


def build_table(store: PairSource | Mixture, tokenizer: Tokenizer, weights: np.ndarray | None = None) -> PairTable:
    """Read every pair once: number images and texts, tokenise all captions in batches.

    Args:
        weights: as `PairTable` has them.
    """
    image_numbers = {image_id: number for number, image_id in enumerate(store.image_ids)}
    image_keys, text_keys, keys = array("q"), array("q"), TextKeys()
    tokens, starts, cut = array("i"), array("q", [0]), 0
    languages: Counter[str] = Counter()
    spoken: Counter[str] = Counter()
    for pairs in _in_batches(store.pairs(), _TEXTS_AT_ONCE):
        texts, all_ids = tokenizer.prepared([pair.text for pair in pairs])
        for pair, text in zip(pairs, texts, strict=True):
            if pair.image_id not in image_numbers:
                raise store.missing_image(pair)
            image_keys.append(image_numbers[pair.image_id])
            text_keys.append(keys.key(pair.text_id, text))
            languages[pair.language or ""] += 1
            spoken[pair.language or detect_language(pair.text) or ""] += 1
        for ids in all_ids:
            # As long as allowed means cut, or exactly fitting; the report of `data check` tells the two apart.
            cut += len(ids) == tokenizer.context_length
            tokens.extend(ids)
            starts.append(len(tokens))
    return PairTable(
        image_keys=np.frombuffer(image_keys, dtype=np.int64),
        text_keys=keys.resolve(np.frombuffer(text_keys, dtype=np.int64)),
        tokens=np.frombuffer(tokens, dtype=np.intc),
        starts=np.frombuffer(starts, dtype=np.int64),
        cut=cut,
        spans=_spans(store),
        languages=languages,
        spoken=spoken,
        weights=weights,
    )


def _spans(store: PairSource | Mixture) -> tuple[Span, ...]:
    spans, start = [], 0
    for part in store.parts if isinstance(store, Mixture) else ():
        spans.append(Span(str(part.store.path), start, start + len(part.store), part.weight))
        start += len(part.store)
    return tuple(spans)


def _in_batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class PairDataset(Dataset):
    """Index of a pair → its picture: ``pixels`` uint8 `preprocessing.shape`, ``pair``, ``fault``. Texts are the table's matter.

    With `preprocessing` None no picture is read (its features come from a cache); `reduced` as in its `decode`. A picture that
    cannot be read is replaced by the next pair's and reported under ``fault``: the run counts these and stops above its limit.

    Args:
        as_file: which pictures are handed over as they are, ``file`` in place of ``pixels``: the device decodes them.
    """

    def __init__(
        self,
        store: PairSource | Mixture,
        table: PairTable,
        preprocessing: Preprocessing | None,
        reduced: bool = True,
        as_file: Callable[[bytes | memoryview], bool] | None = None,
    ) -> None:
        self.store, self.table, self.preprocessing, self.as_file = store, table, preprocessing, as_file
        self.pictures = (
            None
            if preprocessing is None
            else Pictures(store.image_ids, store.image_view, preprocessing, reduced=reduced)
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: list[int]) -> Iterator[dict[str, Any]]:
        """One after the other, so that each picture is put in its place while the processor still has it at hand."""
        return map(self.__getitem__, indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index)

    def sample(self, index: int, *, decoded: bool = False) -> dict[str, Any]:
        """As `__getitem__`; `decoded`: here in any case."""
        if self.pictures is None:
            return {"pair": index, "fault": None}
        first = None
        for attempt in range(len(self)):
            pair = (index + attempt) % len(self)
            if self.as_file is not None and not decoded and (file := self._file(pair)) is not None:
                return {"pair": pair, "file": file, "fault": first}
            pixels, fault = self.pictures[self.table.image_keys[pair]]
            if fault is None:
                return {"pair": pair, "pixels": pixels, "fault": first}
            first = first or f"{name_image(self.store, fault['id'])}: {data_fault(fault | {'id': None})}"
        raise DataFault(
            "no image of the split can be decoded",
            mend=f"Run {check_lines(self.store)}.",
            kind="undecodable-image",
            file=self.store.path,
        )

    def _file(self, pair: int) -> bytes | None:
        """The bytes of a picture that the device decodes; what is wrong with others their decoding will say."""
        pictures = self.pictures
        assert self.as_file is not None and pictures is not None
        try:
            view = pictures.read(pictures.ids[self.table.image_keys[pair]])
        except (DataFault, KeyError, OSError):
            return None
        return bytes(view) if self.as_file(view) else None
