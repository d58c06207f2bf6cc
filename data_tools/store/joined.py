"""Several stores as one source of pairs, by a small description over them that `data join` wrote; nothing is copied.

::

    joined: 1
    stores:                     # in order: pairs of one lie behind those of the one before
    - path: part-1              # as the description's own folder sees it
      generation: 32 hex digits
      pairs: 1000
      images: 400
    shared: 0                   # pictures that lie in more than one of them, with the same bytes; each is one picture

Ids are those of the stores: `data join` has seen that no id means two things.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.arrays import ReadWhenAsked
from data_tools.bars import Bar
from data_tools.errors import RequestError
from data_tools.store.beside import Beside
from data_tools.store.checksum import Checksum
from data_tools.store.contract import Pair
from data_tools.store.layouts import Id, Value, id_key
from data_tools.store.reader import PairStore

FORMAT = 1
ENDINGS = (".yaml", ".yml", ".json")
_LARGEST = 16 * 2**20  # bytes of a description: some 100,000 stores
_AT_ONCE = 8192  # ids


class _Member(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: Annotated[str, Field(min_length=1)]
    generation: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    pairs: Annotated[int, Field(ge=0)]
    images: Annotated[int, Field(ge=0)]


class Description(BaseModel):
    """What the file says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    joined: Literal[1]
    stores: Annotated[list[_Member], Field(min_length=1)]
    shared: Annotated[int, Field(ge=0)] = 0


def is_joined(path: str | Path) -> bool:
    """Whether a file is a description over stores, by its ending and its first word."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).lstrip(b'{ \n\t"').startswith(b"joined")


def read_description(path: str | Path) -> Description:
    """Raises:
    RequestError: it is not readable, or no description.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise RequestError(f"{path}: {path.stat().st_size:,} bytes are no description over stores")
        return Description.model_validate(yaml.safe_load(path.read_bytes()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(
            f"{path}: not readable ({' '.join(str(error).split())[:200]}); write it anew: data join"
        ) from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise RequestError(
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; write it anew: data join"
        ) from None


class JoinedIds(ReadWhenAsked[Id]):
    """The ids of the pictures of all stores in order, each once; of each its store and its number there, 6 bytes."""

    def __init__(self, ids: Sequence[Sequence[Id]]) -> None:
        self._ids = ids
        count = sum(map(len, ids))
        self._stores, self._places = np.empty(count, np.uint16), np.empty(count, np.uint32)
        rows = heapq.merge(*(_keys(number, some) for number, some in enumerate(ids)))
        at, before = 0, b""
        for key, number, place in Bar(rows, desc="ids", unit=" pictures", total=count, delay=2.0):
            if key != before:
                self._stores[at], self._places[at], before = number, place, key
                at += 1
        self._stores, self._places = self._stores[:at].copy(), self._places[:at].copy()

    def __len__(self) -> int:
        return len(self._stores)

    def at(self, position: int) -> Id:
        return self._ids[self._stores[position]][int(self._places[position])]

    def __iter__(self) -> Iterator[Id]:
        for start in range(0, len(self), _AT_ONCE):
            stores, places = (array[start : start + _AT_ONCE].tolist() for array in (self._stores, self._places))
            for store, place in zip(stores, places, strict=True):
                yield self._ids[store][place]


def _keys(number: int, ids: Sequence[Id]) -> Iterator[tuple[bytes, int, int]]:
    for place, image_id in enumerate(ids):
        yield id_key(image_id), number, place


def shared_ids(ids: Sequence[Sequence[Id]]) -> Iterator[tuple[Id, list[int]]]:
    """(id, numbers of the stores) of the pictures that lie in several."""
    group: list[tuple[bytes, int, int]] = []
    for row in heapq.merge(*(_keys(number, some) for number, some in enumerate(ids)), [(b"\xff", 0, 0)]):
        if group and row[0] != group[0][0]:
            if len(group) > 1:
                yield ids[group[0][1]][group[0][2]], [number for _, number, _ in group]
            group = []
        group.append(row)


class JoinedStores(PairStore):
    """A store whose pairs and pictures lie in several, each opened as it is."""

    def __init__(self, path: Path, stores: Sequence[PairStore], shared: int) -> None:
        super().__init__(path)
        self.name, self.stores, self.shared = path.stem, tuple(stores), shared
        self.manifest = None  # each has its own
        self._starts: list[int] = []
        self._recent = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stores": self.stores, "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc] # as it was made; what is computed is computed again

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    def _located(self, index: int) -> tuple[PairStore, int]:
        if not self._starts:
            self._starts = [0, *accumulate(map(len, self.stores))]
        if not 0 <= index < self._starts[-1]:
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        return self.stores[number], index - self._starts[number]

    def __getitem__(self, index: int) -> Pair:
        store, number = self._located(index)
        return store[number]

    def pairs(self) -> Iterator[Pair]:
        for store in self.stores:
            yield from store.pairs()

    def fields(self, start: int, stop: int) -> list[Sequence[Any]]:
        found: list[Sequence[Any]] = []
        first = 0
        for store in self.stores:
            one, other = max(start - first, 0), min(stop - first, len(store))
            if one < other:
                found += store.fields(one, other)
            first += len(store)
        return found

    @cached_property
    def beside_counts(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for store in self.stores:
            total.update(store.beside_counts)
        return dict(total)

    def beside(self, index: int) -> Beside:
        store, number = self._located(index)
        return store.beside(number)

    def all_beside(self) -> Iterator[tuple[int, Beside]]:
        first = 0
        for store in self.stores:
            for number, found in store.all_beside():
                yield first + number, found
            first += len(store)

    @cached_property
    def image_ids(self) -> JoinedIds:
        return JoinedIds([store.image_ids for store in self.stores])

    @cached_property
    def image_count(self) -> int:
        return len(self.image_ids) if self.shared else sum(store.image_count for store in self.stores)

    def _of(self, image_id: Id) -> PairStore:
        """The first store that has it; pictures are mostly asked for by the store."""
        order = range(len(self.stores)) if self.shared else (self._recent, *range(len(self.stores)))
        for number in order:
            if image_id in self.stores[number]:
                self._recent = number
                return self.stores[number]
        raise KeyError(image_id)

    def image_view(self, image_id: Id) -> bytes | memoryview:
        return self._of(image_id).image_view(image_id)

    def __contains__(self, image_id: Id) -> bool:
        return any(image_id in store for store in self.stores)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for store in self.stores for name in store.columns))

    def columns_of(self, image_id: Id) -> dict[str, Value]:
        """Of a picture in several stores, what any of them keeps; the first that says something of a column counts."""
        found: dict[str, Value] = {}
        for store in self.stores if self.shared else (self._of(image_id),):
            if image_id in store:
                found = store.columns_of(image_id) | found
        return found

    @cached_property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        return [text for store in self.stores for text in store.lone_texts]

    @property
    def sums(self) -> tuple[str, str] | None:
        """Those of the stores together; None where a picture in several would be counted for each."""
        total = Checksum()
        for store in self.stores:
            if self.shared or store.sums is None:
                return None
            total.add(store.sums)
        return total.sums

    @cached_property
    def _order(self) -> str:
        return _digest(store.order() for store in self.stores)

    @property
    def generation(self) -> str:
        return _digest(store.generation for store in self.stores)[:32]

    @property
    def about(self) -> dict[str, Any]:
        return {
            "pairs": len(self),
            "images": self.image_count,
            "lone_texts": len(self.lone_texts),
            "stores": len(self.stores),
        }

    @property
    def layout(self) -> str:
        return self.stores[0].layout

    def left_out(self) -> Iterator[dict[str, Any]]:
        for store in self.stores:
            yield from store.left_out()

    @property
    def shards(self) -> int:
        return sum(store.shards for store in self.stores)

    def close(self) -> None:
        for store in self.stores:
            store.close()


def _digest(values: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()
