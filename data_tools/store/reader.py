"""Reading a store: pairs by number, pictures by id. Both layouts, one folder or several shards as one."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.errors import RequestError
from data_tools.scratch import OLD, scratch_folder
from data_tools.store.environments import close_readonly, open_readonly
from data_tools.store.layouts import FORMAT, LAYOUTS, LONE, META, OFFICIAL, VERSION, Id, id_key, json_pair

SHARD = "shard-{:05d}"
PURPOSE = "building"  # of the working folder (`data_tools.store.place`)
_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """One text on one image; a text on two images makes two pairs."""

    image_id: Id
    text_id: Id
    text: str
    language: str | None = None  # "zh" | "en" | "mixed", where known


def replaced_store(path: Path) -> Path:
    """Where the old store lies if a build died between the two renames that replace it."""
    return scratch_folder(Path(os.path.realpath(path)), PURPOSE) / OLD


def shard_folders(path: Path) -> list[Path]:
    """The folders holding ``pairs/`` and ``imgs/``: `path` itself, or its shards in order."""
    return sorted(path.glob("shard-*")) or [path]


def read_meta(folder: Path) -> dict[str, Any]:
    """The record of format, version, layout, counts and checksums of one shard.

    Raises:
        RequestError: not a store, or of a format this version does not know.
    """
    transaction = open_readonly(folder / "pairs").begin()
    value = transaction.get(META)
    if value is None:
        count = transaction.get(OFFICIAL.pair_count_key)
        images = open_readonly(folder / "imgs").begin().get(OFFICIAL.image_count_key)
        if count is None or images is None:
            raise RequestError(
                f"{folder}: neither a store of cnclip-ft nor of the official code (no meta, no num_samples)"
            )
        return {"layout": "official", "pairs": int(count), "images": int(images), "lone_texts": 0, "foreign": True}
    try:
        meta = json.loads(value)
        known = (meta.get("format"), meta.get("version")) == (FORMAT, VERSION) and meta.get("layout") in LAYOUTS
    except (ValueError, AttributeError):
        raise RequestError(f"{folder}: the store's meta record is damaged; build the store again") from None
    if not known:
        raise RequestError(
            f"{folder}: store format {meta.get('format')!r} version {meta.get('version')!r} ({meta.get('layout')}) is not known "
            f"here (known: {FORMAT} {VERSION}). Use a newer cnclip-ft, or build the store again."
        )
    return meta


class _Shard:
    """One pair of LMDB files, opened in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self.layout = LAYOUTS[self.meta["layout"]]
        # Named once: a path costs as much as reading a pair.
        self._pairs_file, self._images_file = folder / "pairs", folder / "imgs"
        self.pairs = open_readonly(self._pairs_file).begin()
        self.images = open_readonly(self._images_file).begin(buffers=True)  # pictures are copied where that is wanted

    def pair_values(self, start: int) -> Iterator[bytes]:
        """Values in order of number; with our keys that is the order on the disk."""
        count = self.meta["pairs"]
        if self.layout is OFFICIAL:
            for index in range(start, count):
                yield self._value(index)
            return
        if start < count:
            cursor = self.pairs.cursor()
            if cursor.set_key(self.layout.pair_key(start)):
                for _, value in zip(range(start, count), cursor.iternext(keys=False, values=True), strict=False):
                    yield value

    def _value(self, index: int) -> bytes:
        value = self.pairs.get(self.layout.pair_key(index))
        if value is None:
            raise RequestError(
                f"{self.folder}: pair {index} of {self.meta['pairs']} is missing; the store is damaged, build it again"
            )
        return value

    def pair(self, index: int) -> Pair:
        return Pair(*self.layout.read_pair(self._value(index), index, self._pairs_file))

    def image(self, image_id: Id) -> bytes | memoryview | None:
        value = self.images.get(self.layout.image_key(image_id))
        return None if value is None else self.layout.read_image(value, image_id, self._images_file)

    def image_ids(self) -> Iterator[Id]:
        for key in self.images.cursor().iternext(keys=True, values=False):
            if key != self.layout.image_count_key:
                yield self.layout.image_id(key)

    def lone_texts(self) -> Iterator[tuple[Id, str, str | None]]:
        cursor = self.pairs.cursor()
        if self.meta["lone_texts"] and cursor.set_range(LONE):
            for key, value in cursor:
                if not (key.startswith(LONE) and len(key) == 12):
                    break
                yield tuple(json.loads(value))


class PairStore:
    """Read access to one split; opened on first use in each process, so it may be sent to workers or held across a fork.

    Raises (on use):
        RequestError: not a store, or of an unknown format.
        DataFault: the official layout holds a pickle that is not a plain pair.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = Path(path), Path(path).name
        self._pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pid=-1)

    def _open(self) -> list[_Shard]:
        if self._pid != os.getpid():
            self._shards = [_Shard(folder) for folder in shard_folders(self.path)]
            self._starts, total = [], 0
            for shard in self._shards:
                self._starts.append(total)
                total += shard.meta["pairs"]
            self._count, self._last, self._pid = total, self._shards[0], os.getpid()
        return self._shards

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
            return self._last.pair(index)
        number = bisect_right(self._starts, index) - 1
        self._last = self._shards[number]
        return self._last.pair(index - self._starts[number])

    def count_entries(self) -> tuple[int, int, int]:
        """(images, pairs, texts without image) really there, from the number of entries in the files."""
        shards = self._open()
        lone = sum(shard.meta["lone_texts"] for shard in shards)
        counts = 1 if shards[0].layout.pair_count_key else 0  # entries a file that hold its count
        images = sum(shard.images.stat()["entries"] - counts for shard in shards)
        pairs = sum(shard.pairs.stat()["entries"] - counts - 1 for shard in shards) - lone
        return images, pairs, lone

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order, read in one sweep."""
        for shard in self._open():
            if shard.layout is OFFICIAL:
                for index in range(shard.meta["pairs"]):
                    yield shard.pair(index)
                continue
            count = 0
            for values in _in_batches(shard.pair_values(0)):
                count += len(values)
                for fields in json.loads(b"[" + b",".join(values) + b"]"):
                    yield Pair(*fields)
            if count != shard.meta["pairs"]:
                raise RequestError(
                    f"{shard.folder}: {count} of {shard.meta['pairs']} pairs are there; build the store again"
                )

    def image(self, image_id: Id) -> bytes:
        """The encoded image file.

        Raises:
            KeyError: no image of this id.
        """
        return bytes(self.image_view(image_id))

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

    def image_of_key(self, shard: int, key: bytes) -> tuple[Id, bytes | None]:
        """(id, encoded image file or None) of a key as it stands in `shard`."""
        part = self._open()[shard]
        image_id, value = part.layout.image_id(key), part.images.get(key)
        return image_id, None if value is None else bytes(part.layout.read_image(value, image_id, part.folder / "imgs"))

    def __contains__(self, image_id: Id) -> bool:
        return any(shard.images.get(shard.layout.image_key(image_id)) is not None for shard in self._open())

    @cached_property
    def image_ids(self) -> list[Id]:
        """Every image in stored order (numbers first, ascending), also those no text speaks of."""
        return [image_id for shard in self._open() for image_id in shard.image_ids()]

    @cached_property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        """Texts no image is known for: (text_id, text, language)."""
        return [text for shard in self._open() for text in shard.lone_texts()]

    @cached_property
    def _checksum(self) -> str:
        total = Checksum()
        metas = [shard.meta for shard in self._open()]
        if all("sums" in meta for meta in metas):
            for meta in metas:
                total.add(meta["sums"])
        else:
            for image_id in tqdm(self.image_ids, desc=f"{self.name}: checksum", unit="image", disable=None, delay=2.0):
                total.image(image_id, self.image(image_id))
            for pair in self.pairs():
                total.pair(pair.image_id, pair.text_id, pair.text)
            for text_id, text, _ in self.lone_texts:
                total.pair(None, text_id, text)
        return total.hexdigest()

    def checksum(self) -> str:
        """sha256 over all images and pairs, hex. Kept in the store; computed where the official code wrote it.

        The same images and pairs give the same sum in any layout, order or number of shards.
        """
        return self._checksum

    def close(self) -> None:
        """Close this process's files."""
        for folder in shard_folders(self.path) if self._pid == os.getpid() else []:
            for part in ("pairs", "imgs"):
                close_readonly(folder / part)
        self._pid = -1


class Checksum:
    """Sums of sha256 values, so that neither order nor sharding shows, and a sum can be saved and gone on with."""

    def __init__(self, sums: tuple[str, str] = ("0", "0")) -> None:
        self._images, self._pairs = (int(value, 16) for value in sums)

    @property
    def sums(self) -> tuple[str, str]:
        return f"{self._images:064x}", f"{self._pairs:064x}"

    def add(self, sums: tuple[str, str]) -> None:
        self._images = (self._images + int(sums[0], 16)) % 2**256
        self._pairs = (self._pairs + int(sums[1], 16)) % 2**256

    def image(self, image_id: Id, data: bytes) -> bytes:
        """Add an image; returns the 32 bytes added."""
        sha = hashlib.sha256(id_key(image_id) + b"\0")
        sha.update(data)
        digest = sha.digest()
        self._images = (self._images + int.from_bytes(digest, "big")) % 2**256
        return digest

    def pair(self, image_id: Id | None, text_id: Id, text: str) -> None:
        value = f"[{json_pair(image_id, text_id, text)}]".encode("utf-8", "replace")
        self._pairs = (self._pairs + int.from_bytes(hashlib.sha256(value).digest(), "big")) % 2**256

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(self.sums).encode()).hexdigest()


def _in_batches(values: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for value in values:
        batch.append(value)
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def open_store(path: str | Path) -> PairStore:
    """Open ``<dir>/<split>``, our layout or the official one, in one piece or in shards.

    Raises:
        RequestError: it is not a store, or of an unknown format.
    """
    path = Path(path)
    place = path if path.exists() else replaced_store(path)
    if not place.exists():
        raise RequestError(
            f"{path}: no such folder. Build a store with `cnclip-ft data build` or `cnclip-ft data import`."
        )
    for folder in shard_folders(place):
        for part in ("pairs", "imgs"):
            if not (folder / part / "data.mdb").is_file():
                raise RequestError(
                    f"{path} is not a store: {(folder / part / 'data.mdb').relative_to(place)} is missing{_splits_inside(place)}. "
                    "Build one with `cnclip-ft data build`."
                )
    store = PairStore(place)
    store.name = path.name
    shards = store._open()
    stated = shards[0].meta.get("shards", 1)
    if stated != len(shards):
        raise RequestError(
            f"{path}: {len(shards)} shards are there, the store has {stated}. Bring the missing ones back."
        )
    return store


def _splits_inside(path: Path) -> str:
    if not path.is_dir():
        return ""
    inside = sorted(p for p in path.iterdir() if (p / "pairs" / "data.mdb").is_file() or (p / SHARD.format(0)).is_dir())
    return f"; name a split: {', '.join(map(str, inside))}" if inside else ""
