"""A store's pairs: texts tokenised once per run, and pictures decoded on demand, as a torch data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cnclip_ft.data.mixture import Mixture, check_lines, name_image
from cnclip_ft.data.pair_tables import ImageIds, Making, TableFolder, starts_of
from cnclip_ft.data.pictures import Pictures, data_fault
from cnclip_ft.models.contract import Preprocessing, Tokenizer
from data_tools.errors import DataFault

if TYPE_CHECKING:
    from data_tools.store import PairSource

KEPT_FROM = 50_000  # pairs: the table of fewer is made in seconds, and no files are left


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
    """All pairs of a store without their pictures, about 60 bytes a pair; of many pairs the arrays are mapped from the disk.

    `image_keys` and `text_keys` are int64 ``[pairs]``. Pairs with equal image keys show the same image, pairs
    with equal text keys carry the same text id or the same prepared text: they are not negatives of each other.
    An image key is the image's position in `store.image_ids`. `spans` are the stores of a mixture, none of a single store;
    `languages` counts pairs by the language they say, "" for none; `spoken` by that and, where there is none, by their letters. `tokens` holds all token ids behind one another,
    those of pair i at ``starts[i]:starts[i + 1]``. With `weights`, float64 ``[pairs]``, an epoch draws one caption a picture by
    them (`data.captions`). `ids` are those of the store's images by their keys, where they are kept with the table.
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
    ids: ImageIds | None = None

    def __len__(self) -> int:
        return len(self.image_keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def image_count(self) -> int:
        """Pictures that the pairs show."""
        # Keys have no gaps to speak of, and sorting them takes far longer.
        return int(np.count_nonzero(np.bincount(self.image_keys)))

    def by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the pairs in the order of their image keys; where those of each key begin, and the end. 16 bytes a pair, sorted anew each
        time."""
        order = np.argsort(self.image_keys, kind="stable")
        return order, np.searchsorted(self.image_keys[order], np.arange(self.image_keys.max() + 2))

    def token_ids(self, pair: int) -> np.ndarray:
        found: np.ndarray = self.tokens[self.starts[pair] : self.starts[pair + 1]].astype(np.intc)
        return found

    def batch(self, pairs: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """Texts of `pairs`, padded as the tokenizer does (where that is to the longest, to one of `lengths`), keys, and the numbers of
        the pairs; all int64."""
        input_ids, attention_mask = pad_rows([self.token_ids(pair) for pair in pairs.tolist()], tokenizer, lengths)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_keys": torch.from_numpy(self.image_keys[pairs]),
            "text_keys": torch.from_numpy(self.text_keys[pairs]),
            "pairs": torch.from_numpy(pairs),
        }

    def batch_of_several(
        self, captions: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()
    ) -> dict[str, torch.Tensor]:
        """What takes the place of a batch's texts where a picture has several: texts of `captions`, numbers of pairs int64 ``[n, m]``, padded
        as in `batch`, int64 ``[n, m, tokens]``, and their keys, int64 ``[n, m]``."""
        rows = [self.token_ids(pair) for pair in captions.ravel().tolist()]
        ids, mask = (part.unflatten(0, captions.shape) for part in pad_rows(rows, tokenizer, lengths))
        return {"input_ids": ids, "attention_mask": mask, "text_keys": torch.from_numpy(self.text_keys[captions])}


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], tokenizer: Tokenizer, lengths: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of some texts as the tokenizer pads them; where that is to the longest, to one of `lengths`, if there are any."""
    free = lengths and tokenizer.padding == "longest"
    return tokenizer.pad(list(rows), padded_length(max(map(len, rows)), lengths) if free else None)


def fixed_lengths(context_length: int) -> tuple[int, ...]:
    """Few lengths, each at most a half above the one before: 16, 24, 32, 48, … and the longest."""
    steps = [base << power for power in range(9) for base in (16, 24)]
    return (*(length for length in steps if length < context_length), context_length)


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """The first of `lengths` that is enough; `longest` itself where there are none."""
    return next(length for length in lengths if length >= longest) if lengths else longest


def build_table(
    store: PairSource | Mixture,
    tokenizer: Tokenizer,
    weights: np.ndarray | None = None,
    *,
    place: Path | None = None,
    device: torch.device | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> PairTable:
    """Number images and texts, tokenise all captions: once for many runs where that is kept, by all devices together.

    Args:
        weights: as `PairTable` has them.
        place: where tables of `KEPT_FROM` pairs and more are kept (`data.pair_tables`); None: it is made in memory.
        device: this process's, for what all devices tell each other.
        say: told when a table is made, and why.

    Raises:
        UserError: nothing can be written at `place`.
        DataFault: a pair is damaged, or names an image that is not there.
    """
    making, ids = Making(store, tokenizer), None
    if place is None or len(store) < KEPT_FROM:
        held = [making.block(number) for number in range(making.blocks)]
        about, starts = making.about(lambda: iter(held)), np.concatenate(list(starts_of(held)))
        arrays = {
            "tokens": np.concatenate([block["tokens"] for block in held]),
            "starts": starts,
            "image_keys": np.concatenate([block["images"] for block in held]),
            "text_keys": making.keys(lambda name: np.concatenate([block[name] for block in held])).all(),
        }
    else:
        kept = TableFolder(place, making, device or torch.device("cpu"))
        about, arrays, ids = kept.ready(say), kept.arrays(), ImageIds(kept.folder)
    return PairTable(
        **arrays,
        cut=about["cut"],
        spans=_spans(store),
        languages=Counter(about["languages"]),
        spoken=Counter(about["spoken"]),
        weights=weights,
        ids=ids,
    )


def _spans(store: PairSource | Mixture) -> tuple[Span, ...]:
    spans, start = [], 0
    for part in store.parts if isinstance(store, Mixture) else ():
        spans.append(Span(str(part.store.path), start, start + len(part.store), part.weight))
        start += len(part.store)
    return tuple(spans)


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
            else Pictures(
                store.image_ids if table.ids is None else table.ids, store.image_view, preprocessing, reduced=reduced
            )
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
