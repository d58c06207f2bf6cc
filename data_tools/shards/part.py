"""One shard → its part of the index: where its pictures begin and what they sum to, its pairs with their texts.

What is a sample, a caption, an id and a fault is said by the sources of `data import`; here it is written down.
"""

from __future__ import annotations

import json
import zipfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.annotations import check_id
from data_tools.atomic import whole_file
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, located
from data_tools.language import LANGUAGES, detect_language, read_language
from data_tools.shards.places import TAR, kind_of, unpack
from data_tools.sources.rows import RowFile
from data_tools.sources.table import TableSource
from data_tools.sources.webdataset import WebDatasetSource
from data_tools.store.beside import beside_json, checked_beside
from data_tools.store.checksum import image_digest
from data_tools.store.layouts import Value
from data_tools.store.manifest import sample

VERSION = 1
SPOKEN = (None, *LANGUAGES)  # by the number that is kept of a pair
MOST_FAULTS = 10_000  # of a shard that are listed; all are counted
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Stamp:
    """What tells a shard from another: bytes, time of change, and CRC-32 of some of its blocks by their number."""

    size: int
    changed: int
    blocks: dict[int, int]

    @classmethod
    def of(cls, file: Path) -> Stamp:
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns, sample(file))

    @classmethod
    def read(cls, kept: list[Any]) -> Stamp:
        return cls(int(kept[0]), int(kept[1]), {int(number): int(sum_) for number, sum_ in kept[2]})

    def as_list(self) -> list[Any]:
        """For JSON."""
        return [self.size, self.changed, [list(block) for block in self.blocks.items()]]

    def content(self) -> list[Any]:
        """Without the time: the same for a copy."""
        return [self.size, *sorted(self.blocks.items())]

    def problem(self, file: Path) -> str | None:
        """In which way `file` is another than this; None: it is this one, perhaps copied."""
        try:
            status = file.stat()
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        if status.st_size != self.size:
            return f"it has {status.st_size:,} bytes, and had {self.size:,} when its index was made"
        if status.st_mtime_ns != self.changed and sample(file) != self.blocks:
            return "its bytes are others than when its index was made"
        return None


class Growing:
    """Texts or other bytes behind one another, with the places where they begin."""

    def __init__(self) -> None:
        self.content, self.starts = bytearray(), array("q", [0])

    def add(self, value: bytes) -> None:
        self.content += value
        self.starts.append(len(self.content))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return {
            name: np.frombuffer(bytes(self.content), np.uint8),
            f"{name}_starts": np.frombuffer(self.starts, np.int64),
        }


@dataclass
class Part:
    """The index of one shard, its arrays by name.

    Of pictures, in the order met, those of equal id and bytes once: ``ids`` (UTF-8, ``S``), ``offsets`` (byte of a tar, row of a
    Parquet file), ``lengths``, ``digests`` (sha256 of the bytes, ``[n, 32]``), ``sums`` (what they add to a checksum under their id).
    Of pairs: ``pair_images`` (number above), ``pair_texts`` (counted from 1), ``languages`` (of `SPOKEN`), ``texts``;
    ``beside_pairs`` and ``beside``, ``column_images`` and ``columns`` where there is anything.
    """

    about: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(repr=False)

    @property
    def stamp(self) -> Stamp:
        return Stamp.read(self.about["stamp"])

    def write(self, file: Path) -> None:
        """Whole or not there.

        Raises:
            UserError: it cannot be written.
        """
        about = np.frombuffer(json.dumps(self.about, ensure_ascii=False).encode("utf-8", "backslashreplace"), np.uint8)
        with whole_file(file) as handle:
            np.savez(handle, allow_pickle=False, about=about, **self.arrays)


def read_part(file: Path) -> Part | None:
    """The part kept in `file`; None where there is none, or none of this version, or a damaged one: it is made again."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        about = json.loads(arrays.pop("about").tobytes())
        if about["version"] != VERSION:
            return None
        part = Part(about, arrays)
        part.stamp  # noqa: B018 - it is read here, so that a damaged one is known now
        return part
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, json.JSONDecodeError):
        return None


def index_shard(file: Path) -> Part:
    """Read a shard once, in order.

    Raises:
        RequestError: a packed tar, a Parquet file without a column of pictures' bytes or of texts, or it changes meanwhile.
    """
    stamp = Stamp.of(file)
    kind = kind_of(file)
    stream, more = (_open_tar(file), dict[str, Any]()) if kind == TAR else _open_parquet(file)
    collected = _Collected(file)
    for item in stream.items:
        collected.take(item)
    if Stamp.of(file) != stamp:
        raise RequestError(f"{file} changes while it is read. Wait until it is whole.")
    about = {
        "version": VERSION,
        "name": file.name,
        "kind": kind,
        "stamp": stamp.as_list(),
        "numbers": max(collected.numbers, stream.counted()),
        "columns": list(collected.columns),
        "beside": collected.counts,
        "faults": collected.faults,
        "faulty": collected.faulty,
        "notes": stream.notes,
        **more,
    }
    return Part(about, collected.arrays())


def _open_tar(file: Path) -> Stream:
    with file.open("rb") as handle:
        first = handle.read(6)
    if first.startswith(_PACKED):
        raise RequestError(unpack(file))
    return WebDatasetSource(str(file)).open()


def _open_parquet(file: Path) -> tuple[Stream, dict[str, Any]]:
    source = TableSource(file)
    stream = source.open()
    table = RowFile(file)
    found = source.columns.resolve(table.columns or [], file)
    schema, metadata = table._parquet.schema_arrow, table._parquet.metadata
    if not _holds_bytes(schema.field(found.image).type):
        raise RequestError(
            f"{file}: column {found.image!r} holds no bytes of pictures but {schema.field(found.image).type}, perhaps their paths. "
            f"Bring the pictures in: cnclip-ft data import table {file} --images FOLDER --output DIR"
        )
    largest = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = (row_group.column(number) for number in range(row_group.num_columns))
        largest = max(
            largest, sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == found.image)
        )
    return stream, {"image": found.image, "group_bytes": largest}


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


class _Collected:
    """The items of one shard, as `StoreWriter` would take them, but for the picture's own bytes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._places: dict[tuple[str, str], int] = {}  # (id, sha256 of the bytes) → number
        self.offsets, self.lengths = array("q"), array("q")
        self.digests, self.sums = bytearray(), bytearray()
        self.pair_images, self.pair_texts, self.languages = array("q"), array("q"), bytearray()
        self.texts, self.kept, self.beside = Growing(), Growing(), Growing()
        self.column_images, self.beside_pairs = array("q"), array("q")
        self.columns: dict[str, None] = {}
        self.counts: dict[str, int] = {}
        self.faults: list[dict[str, object]] = []
        self.faulty: dict[str, int] = {}
        self.numbers = 0

    def take(self, item: Item) -> None:
        try:
            if isinstance(item, DataFault):
                raise item
            if isinstance(item, ImageItem):
                self._image(item)
            else:
                self._text(item)
        except DataFault as error:
            fault = located(error, self.file, getattr(item, "line", None))
            self.faulty[fault.kind] = self.faulty.get(fault.kind, 0) + 1
            if len(self.faults) < MOST_FAULTS:
                self.faults.append(fault.as_dict())

    def _image(self, item: ImageItem) -> None:
        if not isinstance(item.content, bytes):
            raise item.fault(
                "the row names a picture's path, not its bytes", "no-bytes", "Write the bytes, or import it."
            )
        image_id = str(check_id(item.image_id, "the picture's name"))
        if "\0" in image_id:
            raise item.fault("the picture's name holds a NUL", "bad-id", "Give it another name.")
        number = self._places.setdefault((image_id, item.origin or ""), len(self.offsets))
        if number < len(self.offsets):
            return
        self.offsets.append((item.line or 1) - 1 if item.place is None else item.place)
        self.lengths.append(len(item.content))
        self.digests += bytes.fromhex(item.origin or "")
        self.sums += image_digest(image_id, item.content)
        if item.columns:
            self._columns(number, item.columns)

    def _columns(self, number: int, columns: dict[str, Value]) -> None:
        self.column_images.append(number)
        self.kept.add(json.dumps(columns, ensure_ascii=False).encode())
        self.columns.update(dict.fromkeys(columns))

    def _text(self, item: TextItem) -> None:
        number = int(item.text_id)
        self.numbers = max(self.numbers, number)
        image = self._places.get((str(item.image_ids[0]), item.origin or ""))
        if image is None:
            mend = "Mend the picture (its own fault is listed)."
            raise DataFault(
                f"its picture {item.image_ids[0]!r} was refused", mend=mend, kind="refused-image", item_id=number
            )
        language = item.language
        if language is not None and language not in LANGUAGES:
            language = read_language(language)
        found = None if item.beside is None else checked_beside(item.beside, item.text, number)
        if found:
            self.beside_pairs.append(len(self.pair_images))
            self.beside.add(beside_json(found).encode())
            for kind in ("pairs", *found):
                self.counts[kind] = self.counts.get(kind, 0) + 1
        self.pair_images.append(image)
        self.pair_texts.append(number)
        self.languages.append(SPOKEN.index(language or detect_language(item.text)))
        self.texts.add(item.text.encode())

    def arrays(self) -> dict[str, np.ndarray]:
        ids = [image_id.encode() for image_id, _ in self._places]
        return {
            "ids": np.array(ids, dtype=f"S{max(map(len, ids), default=1)}"),
            "offsets": np.frombuffer(self.offsets, np.int64),
            "lengths": np.frombuffer(self.lengths, np.int64),
            "digests": np.frombuffer(bytes(self.digests), np.uint8).reshape(-1, 32),
            "sums": np.frombuffer(bytes(self.sums), np.uint8).reshape(-1, 32),
            "pair_images": np.frombuffer(self.pair_images, np.int64),
            "pair_texts": np.frombuffer(self.pair_texts, np.int64),
            "languages": np.frombuffer(bytes(self.languages), np.uint8),
            "beside_pairs": np.frombuffer(self.beside_pairs, np.int64),
            "column_images": np.frombuffer(self.column_images, np.int64),
            **self.texts.arrays("texts"),
            **self.beside.arrays("beside"),
            **self.kept.arrays("columns"),
        }
