"""Shards as a source of pairs: `PairSource` over an index whose arrays are mapped, pictures read where they lie."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.arrays import ReadWhenAsked
from data_tools.errors import UserError
from data_tools.shards.files import ShardFiles
from data_tools.shards.index import generation, read_meta
from data_tools.shards.joining import mapped
from data_tools.shards.part import SPOKEN, Stamp
from data_tools.store.beside import Beside, read_beside
from data_tools.store.contract import Pair, PairSource
from data_tools.store.layouts import Id, Value, read_columns

_AT_ONCE = 8192  # pairs, ids
_LARGE_GROUP = 64 * 2**20  # bytes


class _Values:
    """Values of any length behind one another, by number."""

    def __init__(self, content: np.ndarray, starts: np.ndarray) -> None:
        self._content, self._starts = content.view(np.ndarray).data, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._content[self._starts[number] : self._starts[number + 1]])

    def some(self, start: int, stop: int) -> list[bytes]:
        """Those of `start` … `stop` − 1."""
        ends = self._starts[start : stop + 1].tolist()
        content = bytes(self._content[ends[0] : ends[-1]])
        return [content[one - ends[0] : end - ends[0]] for one, end in zip(ends, ends[1:], strict=False)]


class Ids(ReadWhenAsked[str]):
    """Ids of pictures in order, none of them held in memory."""

    def __init__(self, values: _Values) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def at(self, position: int) -> str:
        return self._values[position].decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _AT_ONCE):
            for value in self._values.some(start, min(start + _AT_ONCE, len(self))):
                yield value.decode()

    def place(self, image_id: object) -> int:
        """Its position; -1: it is none of them."""
        if not isinstance(image_id, str):
            return -1
        try:
            key = image_id.encode()
        except UnicodeEncodeError:
            return -1
        at = bisect_left(self._values, key)
        return at if at < len(self._values) and self._values[at] == key else -1

    def __contains__(self, image_id: object) -> bool:
        return self.place(image_id) >= 0


class ShardSource(PairSource):
    """Pairs and pictures of shards over their index; opened on first use in each process.

    Args:
        path: what the user named. files: the shards. folder: of their joined index.

    Raises (on use):
        UserError: the index is gone, or a shard was replaced.
        DataFault: a picture cannot be read.
    """

    def __init__(self, path: Path, files: Sequence[Path], folder: Path) -> None:
        self.path, self.files, self.folder = path, tuple(files), folder
        self.name = path.name if path.is_dir() else path.stem if path.exists() else path.parent.name or path.name
        self._generation, self._pid = "", -1
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "files", "folder", "name", "_generation")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pid=-1)

    def _opened(self) -> dict[str, np.ndarray]:
        if self._pid == os.getpid():
            return self._arrays
        meta = read_meta(self.folder)
        if meta is None or self._generation not in ("", generation(meta)):
            raise UserError(
                f"{self.path}: the index in {self.folder} is gone or another one. Start again, and change no shard while it is used."
            )
        self._meta, self._generation = meta, generation(meta)
        self._arrays = {
            name: mapped(
                self.folder / name, np.dtype([tuple(part) for part in kind] if isinstance(kind, list) else kind), count
            )
            for name, (kind, count) in meta["arrays"].items()
        }
        stamps = [Stamp.read(one["stamp"]) for one in meta["shards"]]
        self._shards = ShardFiles(self.files, stamps, meta["image_columns"] or [None] * len(self.files))
        self._ids = Ids(self._values("ids"))
        self._texts, self._beside = self._values("texts"), self._values("beside")
        self._pid = os.getpid()
        return self._arrays

    def _values(self, name: str) -> _Values:
        return _Values(self._arrays[name], self._arrays[f"{name}_starts"])

    @property
    def about(self) -> dict[str, Any]:
        self._opened()
        meta = self._meta
        return {
            "layout": self.layout,
            "pairs": meta["pairs"],
            "images": meta["images"],
            "lone_texts": 0,
            "sums": meta["sums"],
            "shards": len(self.files),
            "columns": meta["columns"],
        }

    @property
    def layout(self) -> str:
        """``shards``."""
        return "shards"

    @property
    def generation(self) -> str:
        self._opened()
        return self._generation

    def __len__(self) -> int:
        return len(self._opened()["pair_images"])

    def __getitem__(self, index: int) -> Pair:
        arrays = self._opened()
        if not 0 <= index < len(arrays["pair_images"]):
            raise IndexError(f"{self.path} has {len(self)} pairs, no number {index}")
        return Pair(
            self._ids[int(arrays["pair_images"][index])],
            int(arrays["pair_texts"][index]),
            self._texts[index].decode(),
            SPOKEN[arrays["languages"][index]],
        )

    def pairs(self) -> Iterator[Pair]:
        for start in range(0, len(self), _AT_ONCE):
            yield from starmap(Pair, self.fields(start, min(start + _AT_ONCE, len(self))))

    def fields(self, start: int, stop: int) -> list[Sequence[Any]]:
        arrays = self._opened()
        images, numbers, languages = (
            arrays[name][start:stop].tolist() for name in ("pair_images", "pair_texts", "languages")
        )
        texts = map(bytes.decode, self._texts.some(start, stop))
        ids = {image: self._ids[image] for image in dict.fromkeys(images)}
        return list(zip(map(ids.__getitem__, images), numbers, texts, map(SPOKEN.__getitem__, languages), strict=True))

    @property
    def beside_counts(self) -> dict[str, int]:
        self._opened()
        return dict(self._meta["beside"])

    def beside(self, index: int) -> Beside:
        numbers = self._opened()["beside_pairs"]
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} pairs, no number {index}")
        at = int(np.searchsorted(numbers, index))
        if at == len(numbers) or numbers[at] != index:
            return {}
        return read_beside(self._beside[at], index, self.folder / "beside")

    def all_beside(self) -> Iterator[tuple[int, Beside]]:
        for at, number in enumerate(self._opened()["beside_pairs"]):
            yield int(number), read_beside(self._beside[at], int(number), self.folder / "beside")

    @property
    def image_ids(self) -> Ids:
        self._opened()
        return self._ids

    @property
    def image_count(self) -> int:
        return len(self.image_ids)

    def image_view(self, image_id: Id) -> bytes:
        """The encoded picture, read where it lies in its shard.

        Raises:
            KeyError: no image of this id.
            DataFault: it cannot be read.
            UserError: its shard was replaced.
        """
        place = self.image_ids.place(image_id)
        if place < 0:
            raise KeyError(image_id)
        shard, offset, length = self._arrays["places"][place].item()
        return self._shards.read(shard, offset, length)

    def __contains__(self, image_id: Id) -> bool:
        return image_id in self.image_ids

    @property
    def columns(self) -> list[str]:
        self._opened()
        return list(self._meta["columns"])

    def columns_of(self, image_id: Id) -> dict[str, Value]:
        at = self._opened().get("column_at")
        place = -1 if at is None else self._ids.place(image_id)
        if at is None or place < 0 or at[place] < 0:
            return {}
        return read_columns(self._values("columns")[int(at[place])], image_id, self.folder / "columns")

    @property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        """None: a text in a shard stands on a picture."""
        return []

    @property
    def stated_checksum(self) -> str:
        self._opened()
        return str(self._meta["checksum"])

    @property
    def stated_order(self) -> str:
        self._opened()
        return str(self._meta["order"])

    def checksum(self) -> str:
        """As a store that is imported from the shards has it."""
        return self.stated_checksum

    def order(self) -> str:
        """As a store that is imported from the shards has it."""
        return self.stated_order

    @property
    def faults(self) -> dict[str, int]:
        self._opened()
        return dict(self._meta["faults"])

    def left_out(self) -> Iterator[dict[str, Any]]:
        """What gives no pair, by shard and member (of a shard that is full of them the first)."""
        self._opened()
        with (self.folder / "faults.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def faults_in_words(self) -> str:
        first = next(self.left_out(), None)
        if first is None:
            return ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.faults.items())
        what = f"{sum(self.faults.values()):,} members or samples give no pair ({kinds})"
        return f"{what}; the first: {first['file']}: {first['id']}: {first['problem']}. {first['mend']}"

    @property
    def notes(self) -> list[str]:
        self._opened()
        found = [f"{self.path}: {told}"] if (told := self.faults_in_words()) else []
        group = self._meta["group_bytes"]
        if group <= _LARGE_GROUP:
            return found
        return [
            *found,
            f"{self.path}: a row group has up to {group / 2**20:,.0f} MiB of pictures; to read one picture a worker reads its whole "
            "group and holds it. Write row groups of about 100 rows, or keep the pictures in tars.",
        ]

    def close(self) -> None:
        """Close this process's files."""
        if self._pid == os.getpid():
            self._shards.close()
        self._pid = -1
