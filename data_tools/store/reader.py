"""Reading a store: pairs by number, pictures by id. Both layouts, one folder or several shards as one."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.arrays import compact
from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.faults import read_faults
from data_tools.store import environments
from data_tools.store.beside import Beside
from data_tools.store.checksum import Checksum, Order
from data_tools.store.contract import Pair, PairSource
from data_tools.store.layouts import OFFICIAL, Id, Value, is_pair
from data_tools.store.manifest import Manifest, read_manifest
from data_tools.store.pages import damaged
from data_tools.store.shard import Shard, shard_folders

_AT_ONCE = 1024
_TRIES = 5  # a store may be replaced while it is being opened


class ReplacedStore(UserError):
    """The store that is read is not the one that was opened."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: {what}. What was read of it before and what would be read from here on do not belong "
            "together. Start again with the store that is there now, and change no store while it is used."
        )


class PairStore(PairSource):
    """Read access to one split; opened on first use in each process, so it may be sent to workers or held across a fork.

    What was opened once stays what is read: another process that finds another store at `path` refuses it.

    Raises (on use):
        RequestError: not a store, or of an unknown format.
        DataFault: it is damaged, or the official layout holds a pickle that is not a plain pair.
        ReplacedStore: it was replaced, moved or deleted since it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = Path(path), Path(path).name
        self._pid, self._generation = -1, ""
        self._shards: list[Shard] = []

    def __getstate__(self) -> dict[str, Any]:
        seen = [kept for shard in self._shards for kept in shard.identities()] if self._pid == os.getpid() else []
        return {"path": self.path, "name": self.name, "_generation": self._generation, "seen": seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        environments.walked.update(state.pop("seen"))
        self.__dict__.update(state, _pid=-1)

    def _open(self) -> list[Shard]:
        if self._pid == os.getpid():
            return self._shards
        try:
            shards, generation = self._open_all_at_once()
        except (RequestError, DataFault, OSError) as error:
            if not self._generation:
                raise
            raise ReplacedStore(self.path, f"the store cannot be opened any more ({error})") from None
        if self._generation not in ("", generation):
            raise ReplacedStore(self.path, "the store was replaced while it was being read")
        self._shards, self._generation = shards, generation
        self._starts, total = [], 0
        for shard in shards:
            self._starts.append(total)
            total += shard.meta["pairs"]
        self._count, self._last, self._pid = total, shards[0], os.getpid()
        return shards

    def _open_all_at_once(self) -> tuple[list[Shard], str]:
        """The shards and what tells them from any other; all of one state of the folder."""
        for _ in range(_TRIES):
            folders = shard_folders(self.path)
            shards = [Shard(folder) for folder in folders]
            before = [shard.identities() for shard in shards]
            digest = hashlib.sha256(b"".join(shard.fingerprint() for shard in shards))
            same = all(shard.holds(found) for shard, found in zip(shards, before, strict=True))
            if same and folders == shard_folders(self.path):
                return shards, digest.hexdigest()[:32]
        raise UserError(f"{self.path} is replaced again and again while it is opened. Wait until that is over.")

    @property
    def generation(self) -> str:
        """32 hex digits that tell this build of the store from any other, also from one of equal content.

        Quick to find (the record of the build, sizes, some blocks of the files), equal for a copy elsewhere. A store of
        an older version or of the official code names no build: one of equal files has the same generation.
        """
        self._open()
        return self._generation

    @property
    def about(self) -> dict[str, Any]:
        """What the store says of itself: the `meta` record of its first shard (docs/store-format.md)."""
        return self._open()[0].meta

    @property
    def layout(self) -> str:
        """``plain`` or ``official``."""
        return self._open()[0].layout.name

    @property
    def shards(self) -> int:
        return len(self._open())

    @cached_property
    def image_count(self) -> int:
        """Images as the store says; `image_ids` counts them."""
        return sum(shard.meta["images"] for shard in self._open())

    def __len__(self) -> int:
        self._open()
        return self._count

    def __getitem__(self, index: int) -> Pair:
        if self._pid != os.getpid():
            self._open()
        if not 0 <= index < self._count:
            raise IndexError(f"{self.path} has {self._count} pairs, no number {index}")
        if len(self._shards) == 1:
            return Pair(*self._last.pair(index))
        number = bisect_right(self._starts, index) - 1
        self._last = self._shards[number]
        return Pair(*self._last.pair(index - self._starts[number]))

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order, read in one sweep.

        Raises:
            DataFault: a pair is damaged or missing; it is named.
        """
        for shard in self._open():
            if shard.layout is OFFICIAL:
                for index in range(shard.meta["pairs"]):
                    yield Pair(*shard.pair(index))
                continue
            count = 0
            for values in _in_batches(shard.pair_values()):
                for fields in _read(shard, values, count):
                    yield Pair(*fields)
                count += len(values)
            if count != shard.meta["pairs"]:
                raise damaged(shard.pairs_file, f"{count:,} of {shard.meta['pairs']:,} pairs are there")

    def fields(self, start: int, stop: int) -> Sequence[Sequence[Any]]:
        found: list[Sequence[Any]] = []
        for shard, first in zip(self._open(), list(self._starts), strict=True):
            one, other = max(start - first, 0), min(stop - first, shard.meta["pairs"])
            if shard.layout is OFFICIAL:
                found += [(*shard.pair(index), None) for index in range(one, other)]
                continue
            for at in range(one, other, _AT_ONCE):
                found += _read(shard, shard.values(at, min(at + _AT_ONCE, other)), at)
        return found

    @cached_property
    def beside_counts(self) -> dict[str, int]:
        total = Counter[str]()
        for shard in self._open():
            total.update(shard.beside_counts)
        return dict(total)

    def beside(self, index: int) -> Beside:
        shards = self._open()
        if not 0 <= index < self._count:
            raise IndexError(f"{self.path} has {self._count} pairs, no number {index}")
        number = bisect_right(self._starts, index) - 1
        return shards[number].beside(index - self._starts[number])

    def all_beside(self) -> Iterator[tuple[int, Beside]]:
        """(number of the pair, what it has beside its text) of the pairs that have anything, in order, read in one sweep."""
        for shard, start in zip(self._open(), list(self._starts), strict=True):
            for number, found in shard.all_beside():
                yield start + number, found

    def image_view(self, image_id: Id) -> bytes | memoryview:
        """The encoded image file as it lies in the store, not copied where the layout allows: not to be kept after `close`.

        Raises:
            KeyError: no image of this id.
        """
        if self._pid != os.getpid():
            self._open()
        # A pair's picture lies in the pair's shard, so the last one used is the likeliest.
        data = self._last.image(image_id)
        if data is None and len(self._shards) > 1:
            for shard in self._shards:
                data = shard.image(image_id)
                if data is not None:
                    self._last = shard
                    break
        if data is None:
            raise KeyError(image_id)
        return data

    @property
    def columns(self) -> list[str]:
        """Names of the columns kept with images, in the order in which they were met; none where nothing was kept."""
        return list(dict.fromkeys(name for shard in self._open() for name in shard.meta.get("columns", ())))

    def columns_of(self, image_id: Id) -> dict[str, Value]:
        """What is kept of an image beside its texts: column → value; empty where nothing is.

        Raises:
            DataFault: it is damaged.
        """
        return next((found for shard in self._open() if (found := shard.columns_of(image_id))), {})

    def image_of_key(self, shard: int, key: bytes) -> tuple[Id, bytes | None]:
        """(id, encoded image file or None) of a key as it stands in `shard`."""
        part = self._open()[shard]
        image_id = part.layout.image_id(key)
        data = part.image_of_key(key, image_id)
        return image_id, None if data is None else bytes(data)

    def __contains__(self, image_id: Id) -> bool:
        return any(image_id in shard for shard in self._open())

    @cached_property
    def image_ids(self) -> Sequence[Id]:
        """Every image in stored order (numbers first, ascending), also those no text speaks of."""
        return compact(image_id for shard in self._open() for image_id in shard.image_ids())

    @cached_property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        """Texts no image is known for: (text_id, text, language)."""
        return [text for shard in self._open() for text in shard.lone_texts()]

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the finished store's files were; None for one of an older version or of the official code.

        Raises:
            RequestError: it is damaged.
        """
        return read_manifest(self.path)

    @property
    def sums(self) -> tuple[str, str] | None:
        """What `checksum` is made of, so that sums of several stores can be added; None where the official code wrote it."""
        total = Checksum()
        for shard in self._open():
            if "sums" not in shard.meta:
                return None
            total.add(shard.meta["sums"])
        return total.sums

    @cached_property
    def stated_checksum(self) -> str | None:
        """The checksum the store was finished with, not looked at again; None where the official code wrote it."""
        sums = self.sums
        return None if sums is None else Checksum(sums).hexdigest()

    @property
    def stated_order(self) -> str | None:
        """As the manifest has it; None where there is none."""
        return self.manifest.order if self.manifest else None

    def left_out(self) -> Iterator[dict[str, Any]]:
        """As its build listed it."""
        return read_faults(self.path)

    @cached_property
    def _checksum(self) -> str:
        if self.stated_checksum is not None:
            return self.stated_checksum
        total = Checksum()
        for image_id in self._bar(self.image_ids, "checksum", "image"):
            total.image(image_id, self.image(image_id))
        for pair, found in self.pairs_and_beside():
            total.pair(pair.image_id, pair.text_id, pair.text, found)
        for text_id, text, _ in self.lone_texts:
            total.pair(None, text_id, text)
        return total.hexdigest()

    def checksum(self) -> str:
        """sha256 over all images and pairs, hex. Kept in the store; computed where the official code wrote it.

        The same images and pairs give the same sum in any layout, order or number of shards. `data check` is what
        computes it again.
        """
        return self._checksum

    @cached_property
    def _order(self) -> str:
        if self.manifest is not None:
            return self.manifest.order
        digest = Order()
        for image_id in self.image_ids:
            digest.image(image_id)
        if self.layout == "plain":
            for shard in self._open():
                for value in self._bar(shard.pair_values(), "order", "pair", shard.meta["pairs"]):
                    digest.plain_pair(value)
        else:
            for pair in self._bar(self.pairs(), "order", "pair", len(self)):
                digest.pair(pair.image_id, pair.text_id, pair.text)
        for text_id, text, _ in self.lone_texts:
            digest.pair(None, text_id, text)
        return digest.hexdigest()

    def order(self) -> str:
        """sha256 over the order of all images and pairs, hex. Kept in the manifest; computed for stores without one.

        Equal `checksum` and `order` mean: image and pair of any number are the same.
        """
        return self._order

    def _bar(self, items: Any, what: str, unit: str, total: int | None = None) -> Any:
        return Bar(items, desc=f"{self.name}: {what}", unit=unit, total=total, delay=2.0)

    def close(self) -> None:
        """Close this process's files."""
        for shard in self._shards if self._pid == os.getpid() else []:
            shard.close()
        self._pid = -1


def _read(shard: Shard, values: list[bytes], first: int) -> Sequence[Sequence[Any]]:
    """Pairs of the plain layout, of which `first` is the first one's number."""
    found: Sequence[Sequence[Any]] | None = _parsed(values)
    return found or [shard.layout.read_pair(value, first + at, shard.pairs_file) for at, value in enumerate(values)]


def _parsed(values: list[bytes]) -> Sequence[Sequence[Any]] | None:
    """The values of many pairs read at once; None where one of them is not what it must be."""
    try:
        found = json.loads(b"[" + b",".join(values) + b"]")
    except (ValueError, RecursionError):
        return None
    return found if len(found) == len(values) and all(map(is_pair, found)) else None


def _in_batches(values: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for value in values:
        batch.append(value)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
