"""One shard of a store: its pair of LMDB files, opened in this process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from data_tools.errors import RequestError
from data_tools.store.beside import Beside, are_counts, read_beside
from data_tools.store.environments import Identity, close_readonly, identity, is_open, open_readonly
from data_tools.store.layouts import (
    BESIDE,
    COLUMNS,
    FORMAT,
    LAYOUTS,
    LONE,
    META,
    OFFICIAL,
    PLAIN,
    PROGRESS,
    VERSION,
    WITH_BESIDE,
    Id,
    Value,
    damaged_value,
    lone_text,
    read_columns,
)
from data_tools.store.manifest import DATA, sample
from data_tools.store.pages import damaged

SHARD = "shard-{:05d}"
_SUM = re.compile("[0-9a-f]{64}")


def shard_folders(path: Path) -> list[Path]:
    """The folders holding ``pairs/`` and ``imgs/``: `path` itself, or its shards in order."""
    return sorted(path.glob("shard-*")) or [path]


def _whole(value: bytes | memoryview) -> int:
    value = bytes(value)
    if not value.isdigit() or len(value) > 18:
        raise ValueError
    return int(value)


def _read_meta(folder: Path, pairs: lmdb.Transaction, images: lmdb.Transaction) -> dict[str, Any]:
    """The record of format, version, layout, counts and checksums of one shard.

    Raises:
        RequestError: not a store, or of a format this version does not know.
    """
    value = pairs.get(META)
    if value is None:
        count, pictures = pairs.get(OFFICIAL.pair_count_key), images.get(OFFICIAL.image_count_key)
        if count is None or pictures is None:
            raise RequestError(
                f"{folder}: neither a store of cnclip-ft nor of the official code (no meta, no num_samples)"
            )
        try:
            return {
                "layout": "official",
                "pairs": _whole(count),
                "images": _whole(pictures),
                "lone_texts": 0,
                "foreign": True,
            }
        except ValueError:
            raise damaged(folder / "pairs" / DATA, "num_samples or num_images is no number") from None
    try:
        meta = json.loads(bytes(value))
        known = meta.get("format") == FORMAT and meta.get("layout") in LAYOUTS
        known = known and meta.get("version") in (VERSION, WITH_BESIDE)
        if not known and type(meta["version"]) is int:
            raise RequestError(
                f"{folder}: store format {meta.get('format')!r} version {meta.get('version')!r} ({meta.get('layout')}) is not "
                f"known here (known: {FORMAT} {VERSION} and {WITH_BESIDE}). Use a newer cnclip-ft, or build the store again."
            )
        numbers = [meta[name] for name in ("pairs", "images", "lone_texts")]
        numbers += [meta.get("shard", 0), meta.get("shards", 1)]
        right = all(type(number) is int and 0 <= number < 2**53 for number in numbers)
        sums = meta.get("sums")
        right &= "sums" not in meta or (len(sums) >= 2 and all(_SUM.fullmatch(part) for part in sums))
        if "columns" in meta:
            right &= type(meta["described"]) is int and all(type(name) is str for name in meta["columns"])
        right &= are_counts(meta["beside"]) if "beside" in meta else meta.get("version") != WITH_BESIDE
        if not known or not right or type(meta.get("build", "")) is not str:
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise damaged(folder / "pairs" / DATA, "the store's meta record is none") from None
    return meta


class Shard:
    """Reads by number and by id.

    Raises (also on use):
        RequestError: not a store, or of an unknown format.
        DataFault: it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Named once: a path costs as much as reading a pair.
        self.pairs_file, self.images_file = folder / "pairs" / DATA, folder / "imgs" / DATA
        with self._told(self.pairs_file):
            self._environments = [open_readonly(folder / part) for part in ("pairs", "imgs")]
            self.pairs = self._environments[0].begin()
            self.images = self._environments[1].begin(buffers=True)  # pictures are copied where that is wanted
            self.meta = _read_meta(folder, self.pairs, self.images)
        self.layout = LAYOUTS[self.meta["layout"]]
        self.files = [self.pairs_file, self.images_file]
        self.beside_counts: dict[str, int] = self.meta.get("beside", {})
        self.columns: lmdb.Transaction | None = None
        if "columns" in self.meta:
            self.files.append(folder / COLUMNS / DATA)
            with self._told(self.files[-1]):
                self._environments.append(open_readonly(folder / COLUMNS))
                self.columns = self._environments[-1].begin()
        self._compare_counts()

    @contextmanager
    def _told(self, file: Path) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise damaged(file, str(error)) from None

    def count_entries(self) -> tuple[int, int]:
        """(images, pairs and texts without image) really there, from the number of entries in the files."""
        official = 1 if self.layout.pair_count_key else 0  # an entry that holds the count
        own = 0 if "foreign" in self.meta else 1  # the meta record
        images, pairs = (
            # A build that was interrupted at its very end left its progress.
            transaction.stat()["entries"] - (transaction.get(PROGRESS) is not None)
            for transaction in (self.images, self.pairs)
        )
        return images - official, pairs - official - own - self.beside_counts.get("pairs", 0)

    def _compare_counts(self) -> None:
        images, texts = self.count_entries()
        stated = self.meta["pairs"] + self.meta["lone_texts"]
        # The official script counts lines: a picture that came twice is one entry there.
        few_images = images < self.meta["images"] and "foreign" not in self.meta
        if (
            few_images
            or images > self.meta["images"]
            or texts < stated
            or ("foreign" not in self.meta and texts > stated)
        ):
            raise damaged(
                self.images_file if images != self.meta["images"] else self.pairs_file,
                f"{images:,} images and {texts:,} pairs and lone texts are there, the store says {self.meta['images']:,} and {stated:,}",
            )
        if self.columns is not None:
            there = self.columns.stat()["entries"] - (self.columns.get(PROGRESS) is not None)
            if there != self.meta["described"]:
                raise damaged(
                    self.files[-1], f"columns of {there:,} images are there, the store says {self.meta['described']:,}"
                )

    def identities(self) -> list[Identity]:
        """Of its files as they lie there now.

        Raises:
            RequestError: one is gone.
        """
        return [identity(file) for file in self.files]

    def holds(self, found: list[Identity]) -> bool:
        """Whether `found` are the files that are open here, and lie there still."""
        return found == self.identities() and all(map(is_open, found, self._environments))

    def fingerprint(self) -> bytes:
        """Of the meta record (which names the build), sizes and some blocks of the files."""
        digest = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        for file in self.files:
            digest.update(json.dumps([file.stat().st_size, *sample(file).items()]).encode())
        return digest.digest()

    def pair_values(self) -> Iterator[bytes]:
        """Values of the plain layout in order of number, which is the order on the disk."""
        cursor = self.pairs.cursor()
        if self.meta["pairs"] and cursor.set_key(self.layout.pair_key(0)):
            for _, value in zip(range(self.meta["pairs"]), cursor.iternext(keys=False, values=True), strict=False):
                yield value

    def values(self, start: int, stop: int) -> list[bytes]:
        """As `value`, of pairs `start` … `stop` − 1 of the plain layout, read in one sweep."""
        cursor, found = self.pairs.cursor(), list[bytes]()
        with self._told(self.pairs_file):
            if start < stop and cursor.set_key(self.layout.pair_key(start)):
                found = list(islice(cursor.iternext(keys=False, values=True), stop - start))
                if len(found) == stop - start and cursor.key() == self.layout.pair_key(stop - 1):
                    return found
        return [self.value(index) for index in range(start, stop)]  # which one is missing

    def value(self, index: int) -> bytes:
        try:
            found = self.pairs.get(self.layout.pair_key(index))
        except lmdb.Error as error:
            raise damaged(self.pairs_file, f"pair {index} cannot be read ({error})") from None
        if found is None:
            raise damaged(self.pairs_file, f"pair {index} of {self.meta['pairs']:,} is missing")
        return found

    def pair(self, index: int) -> Sequence[Any]:
        """(image_id, text_id, text[, language])."""
        return self.layout.read_pair(self.value(index), index, self.pairs_file)

    def beside(self, index: int) -> Beside:
        """What pair `index` has beside its text; empty where it has nothing."""
        if not self.beside_counts:
            return {}
        try:
            found = self.pairs.get(BESIDE + PLAIN.pair_key(index))
        except lmdb.Error as error:
            raise damaged(self.pairs_file, f"what stands beside pair {index} cannot be read ({error})") from None
        return {} if found is None else read_beside(found, index, self.pairs_file)

    def all_beside(self) -> Iterator[tuple[int, Beside]]:
        """(number of the pair in this shard, what it has beside its text) of those that have anything, ascending."""
        if not self.beside_counts:
            return
        cursor, count = self.pairs.cursor(), 0
        with self._told(self.pairs_file):
            if cursor.set_range(BESIDE):
                for key, value in cursor:
                    if not (key.startswith(BESIDE) and len(key) == len(BESIDE) + 8):
                        break
                    number = int.from_bytes(key[len(BESIDE) :], "big")
                    if number >= self.meta["pairs"]:
                        raise damaged(self.pairs_file, f"something stands beside pair {number}, which is not there")
                    yield number, read_beside(value, number, self.pairs_file)
                    count += 1
        wanted = self.beside_counts["pairs"]
        if count != wanted:
            raise damaged(self.pairs_file, f"{count:,} of {wanted:,} pairs have something beside their text")

    def image(self, image_id: Id) -> bytes | memoryview | None:
        return self.image_of_key(self.layout.image_key(image_id), image_id)

    def image_of_key(self, key: bytes, image_id: Id) -> bytes | memoryview | None:
        try:
            value = self.images.get(key)
        except lmdb.Error as error:
            raise damaged(self.images_file, f"image {image_id!r} cannot be read ({error})") from None
        return None if value is None else self.layout.read_image(value, image_id, self.images_file)

    def columns_of(self, image_id: Id) -> dict[str, Value]:
        """What is kept of an image beside its texts: column → value."""
        if self.columns is None:
            return {}
        try:
            value = self.columns.get(self.layout.image_key(image_id))
        except lmdb.Error as error:
            raise damaged(self.files[-1], f"columns of image {image_id!r} cannot be read ({error})") from None
        return {} if value is None else read_columns(bytes(value), image_id, self.files[-1])

    def __contains__(self, image_id: Id) -> bool:
        key = self.layout.image_key(image_id)
        return self.images.get(key) is not None and self.layout.image_id(key) == image_id  # "7" is no 7, under one key

    def image_ids(self) -> Iterator[Id]:
        with self._told(self.images_file):
            for key in map(bytes, self.images.cursor().iternext(keys=True, values=False)):
                if key != self.layout.image_count_key:
                    try:
                        yield self.layout.image_id(key)
                    except (ValueError, ArithmeticError, LookupError):
                        raise damaged_value(f"{key!r} is no image's key", self.images_file) from None

    def lone_texts(self) -> Iterator[tuple[Id, str, str | None]]:
        cursor, count = self.pairs.cursor(), 0
        with self._told(self.pairs_file):
            if self.meta["lone_texts"] and cursor.set_range(LONE):
                for key, value in cursor:
                    if not (key.startswith(LONE) and len(key) == 12):
                        break
                    yield lone_text(value, count, self.pairs_file)
                    count += 1
        if count != self.meta["lone_texts"]:
            raise damaged(self.pairs_file, f"{count:,} of {self.meta['lone_texts']:,} texts without image are there")

    def close(self) -> None:
        for environment in self._environments:
            close_readonly(environment)
