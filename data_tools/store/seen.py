"""Which ids a build has met, and which image a text means: a scratch LMDB beside the store, so that millions need no memory and survive a kill."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import DataFault, UserError
from data_tools.store import environments
from data_tools.store.environments import GrowingWriter
from data_tools.store.layouts import LONGEST_ID, Id, id_key, is_id, key_id

_IMAGE, _TEXT, _CLASH, _FAULT, _SAFE = b"\x01", b"\x02", b"\x03", b"\x04", b"\x00safe"
_IMAGE_RECORD, _TEXT_RECORD = struct.Struct(">QIq8s"), struct.Struct(">QQ")
_PLACE = struct.Struct(">Q")
REFUSED = 2**32 - 1


class SeenImage(NamedTuple):
    """An image of the build: which item of the source it was, where it lies, under which number, and from which file."""

    item: int
    shard: int
    number: int
    origin: bytes

    @property
    def refused(self) -> bool:
        """The image was faulty; texts that name it are told so."""
        return self.shard == REFUSED


def origin_hash(origin: str | None) -> bytes:
    """8 bytes of sha256; zeros for None."""
    return bytes(8) if origin is None else hashlib.sha256(origin.encode("utf-8", "surrogatepass")).digest()[:8]


def text_hash(text: str) -> int:
    """64 bits, to tell two texts of one id apart: length and CRC. Not against an adversary."""
    data = text.encode("utf-8", "surrogatepass")
    return (len(data) & 0xFFFFFFFF) << 32 | zlib.crc32(data)


def other_image_id(image_id: Id, origin: str | None) -> str:
    """The id of another image of this name: ``<name>~<12 digits of its origin>``."""
    mark = f"~{origin_hash(origin).hex()[:12]}"
    return str(image_id).encode()[: LONGEST_ID - len(mark)].decode("utf-8", "ignore") + mark


def _number_of(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) < 19 and str(int(word)) == word else None


def check_id(item_id: object, what: str) -> None:
    """Raises:
    DataFault: it is none.
    """
    if not is_id(item_id):
        raise DataFault(
            f"{what} id {str(item_id)[:60]!r} is neither a 64-bit whole number nor a text of 1 to 500 bytes",
            mend="Give it a shorter or whole-numbered id.",
            kind="bad-id",
        )


class Seen:
    """Ids met so far. What waits for the next flush is found as well."""

    def __init__(self, folder: Path) -> None:
        self._writer = GrowingWriter(folder)
        self._fresh: dict[bytes, bytes] = {}
        self._transaction = self._writer.environment.begin()
        self._clashing = next(self._range(_CLASH), None) is not None
        safe = self._transaction.get(_SAFE)
        self.safe: dict[str, int] = json.loads(safe) if safe else {"items": 0, "faults": 0}

    @property
    def large(self) -> bool:
        return len(self._fresh) >= environments.BATCH_ITEMS

    def _put(self, key: bytes, value: bytes) -> None:
        self._fresh[key] = value

    def _get(self, key: bytes) -> bytes | None:
        return self._fresh.get(key) or self._transaction.get(key)

    def image(self, image_id: Id) -> SeenImage | None:
        value = self._get(_IMAGE + id_key(image_id))
        return SeenImage(*_IMAGE_RECORD.unpack(value)) if value else None

    def add_image(self, image_id: Id, seen: SeenImage) -> None:
        self._put(_IMAGE + id_key(image_id), _IMAGE_RECORD.pack(*seen))

    def text(self, text_id: Id) -> tuple[int, int] | None:
        """(item, hash of the text) where `text_id` was met first."""
        value = self._get(_TEXT + id_key(text_id))
        return _TEXT_RECORD.unpack(value) if value else None

    def add_text(self, text_id: Id, item: int, digest: int) -> None:
        self._put(_TEXT + id_key(text_id), _TEXT_RECORD.pack(item, digest))

    def add_clash(self, image_id: Id) -> None:
        """A second image has this id."""
        self._clashing = True
        self._put(_CLASH + id_key(image_id), b"1")

    def clashes(self, image_id: Id) -> bool:
        return self._clashing and self._get(_CLASH + id_key(image_id)) is not None

    def own_id(self, image_id: Id, item: int, origin: str | None) -> Id:
        """The id for an image of this name: the name, or ``<name>~<digits of its origin>`` where another image has it."""
        known = self.image(image_id)
        if known is None or known.item == item or known.origin == origin_hash(origin):
            return image_id
        return other_image_id(image_id, origin)

    def find_image(self, image_id: Id, item: int, origin: str | None) -> tuple[Id, SeenImage] | DataFault:
        """The image that the text of item `item` means by `image_id`, or what is wrong with it.

        With `origin` it is the image of that origin, not another that has its id.
        """
        check_id(image_id, "image")
        seen = self.image(image_id)
        if seen is None:
            # The official files hold the same id once as text (TSV) and once as number (JSONL).
            other = str(image_id) if isinstance(image_id, int) else _number_of(image_id)
            seen = None if other is None else self.image(other)
            if other is not None and seen is not None:
                image_id = other
        if seen is not None and origin is not None and seen.origin != origin_hash(origin):
            image_id = other_image_id(image_id, origin)
            seen = self.image(image_id)
            if seen is None:
                return DataFault(
                    f"its image was refused: {image_id.rpartition('~')[0]!r} is another image's id",
                    kind="refused-image",
                    mend="Give every image an id of its own.",
                )
        if seen is not None and origin is None and self.clashes(image_id):
            return DataFault(
                f"it names image {image_id!r}, and several images have this id",
                kind="refused-image",
                mend="Give every image an id of its own (the fault of the second one is listed).",
            )
        if seen is None or seen.item > item:  # an interrupted build may have seen it, the straight one has not yet
            return DataFault(
                f"it names image {image_id!r}, which is not there",
                mend="Add the image or drop its id.",
                kind="missing-image",
            )
        if seen.refused:
            return DataFault(
                f"it names image {image_id!r}, which was refused",
                mend="Mend the image (its own fault is listed).",
                kind="refused-image",
            )
        return image_id, seen

    def add_fault(self, place: int, line: bytes) -> None:
        """A line of the list of faults, and where in it the line begins."""
        self._put(_FAULT + _PLACE.pack(place), line)

    def faults(self, end: int) -> Iterator[bytes]:
        """The lines of the list up to byte `end`.

        Raises:
            UserError: they were not kept.
        """
        place = 0
        while place < end:
            line = self._get(_FAULT + _PLACE.pack(place))
            if line is None:
                raise UserError("the faults of the interrupted build were not kept; start anew without --continue.")
            yield line
            place += len(line)

    def flush(self) -> None:
        """Write what is new; `safe` says up to where everything else was written before."""
        self._transaction.abort()
        self._writer.write([*self._fresh.items(), (_SAFE, json.dumps(self.safe).encode())])
        self._fresh.clear()
        self._transaction = self._writer.environment.begin()

    def images(self) -> Iterator[tuple[Id, SeenImage]]:
        """All flushed images."""
        for key, value in self._range(_IMAGE):
            yield key_id(key), SeenImage(*_IMAGE_RECORD.unpack(value))

    def count_texts(self) -> int:
        return sum(1 for _ in self._range(_TEXT))

    def _range(self, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._transaction.cursor()
        if cursor.set_range(prefix):
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key[1:], value

    def close(self) -> None:
        self._transaction.abort()
        self._writer.close()
