"""The store: one split's pairs and pictures in two LMDB files (format: docs/store-format.md). Reading and writing.

A store is a folder ``<dir>/<split>`` with ``pairs/`` and ``imgs/``. Images are kept as they came, ids as they were
given (int or str). The official layout is read as well, and written on request.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data_tools import official
from data_tools.environments import GrowingWriter, close_readonly, open_readonly
from data_tools.errors import RequestError, UserError

FORMAT, VERSION = "cnclip-ft-store", 1
META = b"meta"
Id = int | str
Layout = Literal["plain", "official"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One text on one image; a text on two images makes two pairs."""

    image_id: Id
    text_id: Id
    text: str
    language: str | None = None  # "zh" | "en" | "mixed", where known


def _number(key: int) -> bytes:
    return struct.pack(">Q", key)


def image_key(image_id: Id) -> bytes:
    """``7`` for the number, ``"7"`` for the word."""
    return json.dumps(image_id, ensure_ascii=False).encode()


class PairStore:
    """Read access; opened on first use in each process, so it may be sent to workers or held across a fork."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = Path(path), Path(path).name
        self._pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def _open(self) -> None:
        if self._pid != os.getpid():
            self._pairs, self._images = (open_readonly(self.path / part).begin() for part in ("pairs", "imgs"))
            self._pid = os.getpid()

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Format, version, counts, checksum, lone texts; ``layout`` is ``plain`` or ``official``."""
        self._open()
        value = self._pairs.get(META)
        if value is None:
            count = self._pairs.get(b"num_samples")
            if count is None:
                raise RequestError(f"{self.path}: neither a store of cnclip-ft nor of the official code (no meta, no num_samples)")
            return {"layout": "official", "pairs": int(count.decode()), "lone_texts": []}
        meta = json.loads(value)
        if meta.get("format") != FORMAT or meta.get("version") != VERSION:
            raise RequestError(
                f"{self.path}: store format {meta.get('format')} version {meta.get('version')} is not known here "
                f"(known: {FORMAT} {VERSION}). Use a newer cnclip-ft, or build the store again."
            )
        return meta

    @property
    def official(self) -> bool:
        return self.meta["layout"] == "official"

    def __len__(self) -> int:
        return self.meta["pairs"]

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._open()
        key = str(index).encode() if self.official else _number(index)
        return self._pair(key, self._pairs.get(key))

    def _pair(self, key: bytes, value: bytes | None) -> Pair:
        if value is None:
            raise RequestError(f"{self.path}: pair {key!r} is missing; the store is damaged, build it again")
        if self.official:
            return Pair(*official.read_pair(value, key.decode(), self.path / "pairs"))
        return Pair(*json.loads(value))

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order."""
        return (self[index] for index in range(len(self)))

    def image(self, image_id: Id) -> bytes:
        """The encoded image file.

        Raises:
            KeyError: no image of this id.
        """
        is_official = self.official
        self._open()
        value = self._images.get(str(image_id).encode() if is_official else image_key(image_id))
        if value is None:
            raise KeyError(image_id)
        return official.read_image(value, str(image_id), self.path / "imgs") if is_official else value

    @cached_property
    def image_ids(self) -> list[Id]:
        """Every image, also those no text speaks of."""
        is_official = self.official
        self._open()
        keys = self._images.cursor().iternext(values=False)
        if not is_official:
            return [json.loads(key) for key in keys]
        names = (key.decode() for key in keys if key != b"num_images")
        return [int(name) if name.isdecimal() else name for name in names]

    @property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        """Texts no image is known for: (text_id, text, language)."""
        return [tuple(text) for text in self.meta["lone_texts"]]

    @cached_property
    def _checksum(self) -> str:
        digest = _Checksum()
        for image_id in self.image_ids:
            digest.image(image_id, self.image(image_id))
        for pair in self.pairs():
            digest.pair(pair)
        return digest.hexdigest()

    def checksum(self) -> str:
        """sha256 over all images and pairs, hex; kept in the store, computed for the official layout."""
        return self.meta.get("checksum") or self._checksum


class _Checksum:
    """Sum over items, so that the order they were written in does not matter for images."""

    def __init__(self) -> None:
        self._images, self._pairs = 0, hashlib.sha256()

    def image(self, image_id: Id, data: bytes) -> None:
        digest = hashlib.sha256(image_key(image_id) + b"\0" + data).digest()
        self._images = (self._images + int.from_bytes(digest, "big")) % 2**256

    def pair(self, pair: Pair) -> None:
        self._pairs.update(json.dumps([pair.image_id, pair.text_id, pair.text], ensure_ascii=False).encode())

    def hexdigest(self) -> str:
        return hashlib.sha256(self._images.to_bytes(32, "big") + self._pairs.digest()).hexdigest()


def open_store(path: str | Path) -> PairStore:
    """Open ``<dir>/<split>``, our layout or the official one.

    Raises:
        RequestError: it is not a store, or of an unknown format.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"{path}: no such folder. Build a store with `cnclip-ft data build` or `data import`.")
    for part in ("pairs", "imgs"):
        if not (path / part / "data.mdb").is_file():
            inside = [p.name for p in path.iterdir() if (p / "pairs" / "data.mdb").is_file()] if path.is_dir() else []
            hint = f"; name a split: {', '.join(str(path / name) for name in sorted(inside))}" if inside else ""
            raise RequestError(f"{path} is not a store: {part}/data.mdb is missing{hint}. Build one with `cnclip-ft data build`.")
    store = PairStore(path)
    store.meta  # noqa: B018 - an unknown format is refused here, not in a worker
    return store


class StoreWriter:
    """Builds a store beside its place and puts it there, verified, in one rename. Use as a context manager.

    Raises:
        UserError: the disk is full or not writable. What was at `target` before is untouched.
    """

    def __init__(self, target: str | Path, *, layout: Layout = "plain") -> None:
        self.target, self.layout = Path(target), layout
        self.beside = self.target.with_name(f"{self.target.name}.building")
        try:
            shutil.rmtree(self.beside, ignore_errors=True)
            self._writers = [GrowingWriter(self.beside / part) for part in ("pairs", "imgs")]
        except OSError as error:
            raise UserError(f"{self.target} cannot be written ({error}). Choose another place.") from None
        self._checksum, self._finished = _Checksum(), False
        self.pairs = self.images = 0
        self._lone: list[tuple[Id, str, str | None]] = []
        self._sample: dict[Id, str] = {}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            for writer in self._writers:
                writer.environment.close()
            shutil.rmtree(self.beside, ignore_errors=True)

    def add_image(self, image_id: Id, data: bytes) -> None:
        """Add an encoded image file; each id once."""
        key = str(image_id).encode() if self.layout == "official" else image_key(image_id)
        if len(key) > 500:
            raise UserError(f"image id {image_id!r} is longer than 500 bytes; give it a shorter one")
        self._writers[1].put(key, official.write_image(data) if self.layout == "official" else data)
        self._checksum.image(image_id, data)
        if len(self._sample) < 64 or self.images % 997 == 0:
            self._sample[image_id] = hashlib.sha256(data).hexdigest()
        self.images += 1

    def add_pair(self, image_id: Id, text_id: Id, text: str, language: str | None = None) -> None:
        pair = Pair(image_id, text_id, text, language)
        if self.layout == "official":
            self._writers[0].put(str(self.pairs).encode(), official.write_pair(image_id, text_id, text))
        else:
            value = json.dumps([image_id, text_id, text, language], ensure_ascii=False, separators=(",", ":"))
            self._writers[0].put(_number(self.pairs), value.encode("utf-8", "replace"))
        self._checksum.pair(pair)
        self.pairs += 1

    def add_lone_text(self, text_id: Id, text: str, language: str | None = None) -> None:
        """A text no image is known for: searched with, never trained on."""
        self._lone.append((text_id, text, language))

    def finish(self) -> PairStore:
        """Write counts, verify by reading back, bring it to the disk, and put it in its place."""
        if self.layout == "official":
            self._writers[0].put(b"num_samples", str(self.pairs).encode())
            self._writers[1].put(b"num_images", str(self.images).encode())
        else:
            meta = {"format": FORMAT, "version": VERSION, "layout": "plain", "pairs": self.pairs, "images": self.images,
                    "lone_texts": self._lone, "checksum": self._checksum.hexdigest()}  # fmt: skip
            self._writers[0].put(META, json.dumps(meta, ensure_ascii=False).encode())
        for writer in self._writers:
            writer.close()
        self._verify()
        self._finished = True
        old = self.target.with_name(f"{self.target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            os.replace(self.target, old)
        os.replace(self.beside, self.target)
        shutil.rmtree(old, ignore_errors=True)
        return open_store(self.target)

    def _verify(self) -> None:
        store = open_store(self.beside)
        found = (len(store), len(store.image_ids))
        if found != (self.pairs, self.images):
            raise UserError(f"{self.target}: {found} pairs and images were read back, {(self.pairs, self.images)} written")
        for image_id, digest in self._sample.items():
            if hashlib.sha256(store.image(image_id)).hexdigest() != digest:
                raise UserError(f"{self.target}: image {image_id!r} reads back differently; the disk may be failing")
        del store
        for part in ("pairs", "imgs"):
            close_readonly(self.beside / part)
