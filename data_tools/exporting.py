"""A store in other forms: tars for WebDataset, a Hugging Face imagefolder, Parquet, the official source files, another store.

Each form is a function that writes into a folder beside the output. What was written is then read back by the importer
of that form and compared, picture by picture and text by text, before the folder takes its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_tools.atomic import sync_file, sync_folder
from data_tools.bars import Bar
from data_tools.build import build_store
from data_tools.columns import EVERYTHING, Where
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.items import ImageItem, Source
from data_tools.outputs import is_empty, refuse_overlap
from data_tools.pictures import read_header
from data_tools.scratch import Scratch, real_place
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.sources.stored import StoreSource
from data_tools.store import Id, Pair, PairStore, open_store, refuse_place
from data_tools.store.layouts import Value
from data_tools.walk import ending_of

FORMATS = ("webdataset", "imagefolder", "parquet", "tsv", "official", "store")
_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "AVIF": "avif"}  # fmt: skip
_OURS = ("image_id", "captions", "language", "text", "file_name", "image")  # fields that no kept column may be called
_A_FILE = 5000  # pictures in a tar or Parquet file
_ROWS = 64  # of Parquet at once


@dataclass(frozen=True)
class Selection:
    """Which part of a store: pictures whose kept columns meet `where`, texts of these `languages` (none: all), columns kept."""

    where: Where = EVERYTHING
    languages: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        return not self.where and not self.languages

    def keeps(self, store: PairStore, image_id: Id) -> bool:
        return not self.where or self.where.holds(store.columns_of(image_id))

    def keeps_pair(self, pair: Pair) -> bool:
        return not self.languages or pair.language in self.languages

    def pictures(self, store: PairStore, with_text: bool) -> list[Id]:
        """The chosen pictures in stored order; `with_text`: those alone that a chosen text stands on."""
        found = [image_id for image_id in store.image_ids if self.keeps(store, image_id)]
        if not with_text:
            return found
        told = {pair.image_id for pair in store.pairs() if self.keeps_pair(pair)}
        return [image_id for image_id in found if image_id in told]

    def columns_of(self, store: PairStore, image_id: Id) -> dict[str, Value]:
        found = store.columns_of(image_id)
        return found if self.columns is None else {name: found[name] for name in self.columns if name in found}


@dataclass
class Exported:
    """What was written."""

    images: int
    pairs: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A picture with its texts, as the forms write it."""

    number: int
    image_id: Id
    data: bytes
    ending: str
    texts: list[Pair]
    columns: dict[str, Value]

    @property
    def key(self) -> str:
        return f"{self.number:09d}"

    @property
    def language(self) -> str | None:
        """Of its texts, where they have one in common."""
        said = {pair.language for pair in self.texts}
        return said.pop() if len(said) == 1 else None


class Pictures:
    """The chosen pictures that have a text, in stored order, with their texts.

    Args:
        names: of the columns they may have.
    """

    def __init__(self, store: PairStore, chosen: Selection, names: list[str], progress: bool) -> None:
        self.store, self.chosen, self.names, self.progress = store, chosen, names, progress
        self.ids = chosen.pictures(store, True)
        numbers = {image_id: number for number, image_id in enumerate(self.ids)}
        owners = np.full(len(store), -1, np.int64)
        for place, pair in enumerate(store.pairs()):
            if chosen.keeps_pair(pair):
                owners[place] = numbers.get(pair.image_id, -1)
        self._order = np.argsort(owners, kind="stable")
        self._starts = np.searchsorted(owners[self._order], np.arange(len(self.ids) + 1))
        self.pairs = int(self._starts[-1] - self._starts[0])
        self.single = self.pairs == len(self.ids)  # one text each

    def __iter__(self) -> Iterator[Picture]:
        store = self.store
        bar = Bar(self.ids, desc="writing", unit="image", shown=self.progress, delay=1.0)
        for number, image_id in enumerate(bar):
            own = self._order[self._starts[number] : self._starts[number + 1]]
            data = store.image(image_id)
            try:
                ending = _ENDINGS.get(read_header(data).format, "jpg")
            except DataFault as fault:
                raise DataFault(
                    fault.problem,
                    mend="Build the store again without it: --on-error skip.",
                    kind=fault.kind,
                    file=store.path,
                    item_id=image_id,
                ) from None
            texts = [store[int(pair)] for pair in own]
            yield Picture(number, image_id, data, ending, texts, self.chosen.columns_of(store, image_id))


def export_store(
    path: Path,
    output: Path,
    to: str,
    *,
    chosen: Selection | None = None,
    shard_size: int | None = None,
    progress: bool = True,
) -> Exported:
    """Write the store `path`, or a part of it, to the new folder `output` in form `to`.

    Args:
        shard_size: pictures in a tar or Parquet file (5,000), or in a shard of a store (none: one piece).

    Raises:
        RequestError: an unknown form, an output that is there, or a part that is empty.
        UserError: it reads back differently, or the disk is full; nothing is at `output` then.
    """
    chosen = chosen or Selection()
    if to not in FORMATS:
        raise RequestError(f"--to {to!r}: one of {', '.join(FORMATS)}")
    refuse_overlap(output, [path])
    store = open_store(path)
    chosen.where.check(store.columns, path)
    for name in chosen.columns or ():
        if name not in store.columns:
            raise RequestError(f"{path} keeps no column {name!r}; there are {', '.join(store.columns) or 'none'}")
    kept = store.columns if chosen.columns is None else list(chosen.columns)
    clashing = [name for name in kept if name in _OURS]
    if clashing and to in _WRITERS:
        raise RequestError(
            f"the kept column {clashing[0]!r} is called like a field of this form; leave it out with --keep-columns"
        )
    if to in ("store", "official"):
        return _other_store(store, output, to, chosen, shard_size, progress)
    if output.exists() and not is_empty(output):
        raise RequestError(f"{output} is there already; choose another output, or remove it")
    place = real_place(output)
    scratch = Scratch(place, "exporting", "writing this export")
    try:
        scratch.clear()
        folder = scratch.folder / "new"
        folder.mkdir()
        done = _write(store, folder, to, chosen, kept, shard_size or _A_FILE, progress)
        _compare(store, chosen, _READERS[to](folder), to, progress)
        for file in folder.rglob("*"):
            if file.is_file():
                sync_file(file)
        if place.is_dir():
            for left in place.iterdir():  # what file managers leave
                left.unlink()
            place.rmdir()
        os.rename(folder, place)
        sync_folder(place.parent)
        return done
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror or error}). Free some space or choose another place."
        ) from None
    finally:
        scratch.remove()


def _write(
    store: PairStore, folder: Path, to: str, chosen: Selection, names: list[str], size: int, progress: bool
) -> Exported:
    if to == "tsv":
        return _official_files(store, folder, chosen, progress)
    pictures = Pictures(store, chosen, names, progress)
    if not pictures.ids:
        by = f" by {chosen.where}" if chosen.where else ""
        raise RequestError(f"{store.path}: no picture with a text is chosen{by}")
    _WRITERS[to](pictures, folder, size)
    done = Exported(len(pictures.ids), pictures.pairs)
    without = len(chosen.pictures(store, False)) - len(pictures.ids)
    if without:
        done.notes.append(f"{without:,} pictures without a text are left out")
    if store.lone_texts:
        done.notes.append(
            f"{len(store.lone_texts):,} texts without a picture are left out: this form has no place for them"
        )
    return done


def _captions(picture: Picture, single: bool) -> Any:
    return picture.texts[0].text if single else [pair.text for pair in picture.texts]


def _webdataset(pictures: Pictures, folder: Path, size: int) -> None:
    """``00000.tar`` …: ``key.jpg``, ``key.json`` with all captions and columns, ``key.txt`` where every picture has one caption."""
    tar: tarfile.TarFile | None = None
    for picture in pictures:
        if picture.number % size == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{picture.number // size:05d}.tar", "w", format=tarfile.PAX_FORMAT)
        assert tar is not None
        about = {"image_id": picture.image_id, "captions": [pair.text for pair in picture.texts], **picture.columns}
        about |= {"language": picture.language} if picture.language else {}
        parts = [(picture.ending, picture.data), ("json", json.dumps(about, ensure_ascii=False).encode())]
        parts += [("txt", picture.texts[0].text.encode())] if pictures.single else []
        for ending, data in parts:
            member = tarfile.TarInfo(f"{picture.key}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if tar is not None:
        tar.close()


def _imagefolder(pictures: Pictures, folder: Path, size: int) -> None:
    """``images/…`` and ``metadata.jsonl``: ``file_name``, ``text`` (a list where a picture has several), columns."""
    taken: set[str] = set()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for picture in pictures:
            name = _file_name(picture, taken)
            place = folder / "images" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(picture.data)
            row = {"file_name": f"images/{name}", "text": _captions(picture, pictures.single), **picture.columns}
            row |= {"language": picture.language} if picture.language else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _file_name(picture: Picture, taken: set[str]) -> str:
    """The id where it is the path of a picture that any system can write, else the number."""
    name = str(picture.image_id)
    parts = PurePosixPath(name).parts
    plain = all(
        part not in (".", "..", "/") and len(part.encode()) <= 200 and not part.startswith(".") for part in parts
    )
    plain = plain and not any(ord(mark) < 32 or mark in '\\:*?"<>|' for mark in name) and "/".join(parts) == name
    right = _ENDINGS.get(
        {"jpeg": "JPEG", "jpg": "JPEG", "tiff": "TIFF"}.get(ending_of(name).lstrip("."), ""),
        ending_of(name).lstrip("."),
    )
    if not plain or right != picture.ending or name.casefold() in taken:
        name = f"{picture.key}.{picture.ending}"
    taken.add(name.casefold())
    return name


def _parquet(pictures: Pictures, folder: Path, size: int) -> None:
    """``00000.parquet`` …: ``image`` {bytes, path} as Hugging Face has it, ``text``, ``image_id``, ``language``, columns as text."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise RequestError("Parquet needs pyarrow: pip install 'cnclip-ft[parquet]'") from None
    text = arrow.string() if pictures.single else arrow.list_(arrow.string())
    own = [("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])), ("text", text)]
    schema = arrow.schema(own + [(name, arrow.string()) for name in ("image_id", "language", *pictures.names)])
    rows: list[dict[str, Any]] = []
    writer: Any = None

    def flush() -> None:
        if rows:
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

    for picture in pictures:
        if picture.number % size == 0:
            flush()
            if writer is not None:
                writer.close()
            writer = parquet.ParquetWriter(folder / f"{picture.number // size:05d}.parquet", schema)
        row = {"image": {"bytes": picture.data, "path": f"{picture.key}.{picture.ending}"}, "text": _captions(picture, pictures.single),
               "image_id": str(picture.image_id), "language": picture.language}  # fmt: skip
        rows.append(row | {name: str(value) for name, value in picture.columns.items()})
        if len(rows) == _ROWS:
            flush()
    flush()
    writer.close()


def _official_files(store: PairStore, folder: Path, chosen: Selection, progress: bool) -> Exported:
    """``<name>_imgs.tsv`` and ``<name>_texts.jsonl``, as the official scripts read them; words for ids are numbered."""
    name, done = store.name, Exported(0, 0)
    ids = chosen.pictures(store, bool(chosen.languages))
    words = any(isinstance(image_id, str) for image_id in ids)
    number_of: dict[Id, Id] = (
        {image_id: number for number, image_id in enumerate(ids, 1)} if words else {i: i for i in ids}
    )
    with (folder / f"{name}_imgs.tsv").open("wb") as file:
        for image_id in Bar(ids, desc="writing", unit="image", shown=progress, delay=1.0):
            file.write(b"%s\t%s\n" % (str(number_of[image_id]).encode(), base64.b64encode(store.image(image_id))))
            done.images += 1
    if words:
        with (folder / "image_ids.tsv").open("w", encoding="utf-8", newline="\n") as numbers:
            numbers.writelines(f"{number}\t{image_id}\n" for image_id, number in number_of.items())
        done.notes.append("images have words for ids: they are numbered, and image_ids.tsv leads back")
    texts: dict[Id, dict[str, Any]] = {}
    for pair in store.pairs():
        if pair.image_id in number_of and chosen.keeps_pair(pair):
            line = texts.setdefault(
                pair.text_id, {"text_id": pair.text_id, "text": pair.text, "image_ids": [], "language": pair.language}
            )
            line["image_ids"].append(number_of[pair.image_id])
            done.pairs += 1
    if not done.pairs and not (chosen.whole and store.lone_texts):
        raise RequestError(f"{store.path}: no pair is chosen")
    for text_id, text, language in store.lone_texts if chosen.whole else ():
        texts[text_id] = {"text_id": text_id, "text": text, "image_ids": [], "language": language}
    with (folder / f"{name}_texts.jsonl").open("w", encoding="utf-8", newline="\n") as jsonl:
        for line in texts.values():
            jsonl.write(
                json.dumps({key: value for key, value in line.items() if value is not None}, ensure_ascii=False) + "\n"
            )
    if store.columns:
        done.notes.append(f"the official files have no place for {', '.join(store.columns)}")
    return done


def _other_store(
    store: PairStore, output: Path, to: str, chosen: Selection, shard_size: int | None, progress: bool
) -> Exported:
    refuse_place(output, overwrite=False)
    ids = set(chosen.pictures(store, bool(chosen.languages)))
    source = StoreSource(
        store.path, keep=ids.__contains__, keep_pair=chosen.keeps_pair, lone=chosen.whole, columns=chosen.columns
    )
    layout = "official" if to == "official" else "plain"
    report = build_store(source, output, layout=layout, shard_size=shard_size, progress=progress)
    _compare(store, chosen, StoreSource(output), to, progress)
    return Exported(report.images, report.pairs, report.notes)


def _compare(store: PairStore, chosen: Selection, found: Source, to: str, progress: bool) -> None:
    """Read the export back and compare what it holds with what was to be in it, in any order, by sums of hashes.

    Raises:
        UserError: something differs.
    """

    def picture(own: bytes, kept: Mapping[str, Value]) -> int:
        said = [] if to == "tsv" else sorted((name, str(value)) for name, value in kept.items() if name not in _OURS)
        return _sum(own + json.dumps(said).encode())

    wanted, known = [0, 0], dict[Id, bytes]()
    for image_id in chosen.pictures(store, to in _WRITERS or bool(chosen.languages)):
        known[image_id] = hashlib.sha256(store.image(image_id)).digest()
        wanted[0] += picture(known[image_id], chosen.columns_of(store, image_id))
    for pair in store.pairs():
        if pair.image_id in known and chosen.keeps_pair(pair):
            wanted[1] += _sum(known[pair.image_id] + pair.text.encode())
    for _, text, _ in store.lone_texts if to not in _WRITERS and chosen.whole else ():
        wanted[1] += _sum(text.encode())
    there, hashes = [0, 0], dict[Id, bytes]()
    stream = found.open()
    for item in Bar(stream.items, desc="reading back", unit="item", shown=progress, delay=1.0):
        if isinstance(item, DataFault):
            raise UserError(f"the export reads back with a fault ({item}); the disk may be failing")
        if isinstance(item, ImageItem):
            hashes[item.image_id] = hashlib.sha256(item.read()).digest()
            there[0] += picture(hashes[item.image_id], item.columns or {})
        else:
            for own in [hashes[image_id] for image_id in item.image_ids] or [b""]:
                there[1] += _sum(own + item.text.encode())
    if wanted != there:
        what = " and ".join(name for name, a, b in zip(("pictures", "texts"), wanted, there, strict=True) if a != b)
        raise UserError(
            f"the {what} of the export read back differently; the disk may be failing. Nothing was put in place"
        )


def _sum(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest(), "big")


_WRITERS: dict[str, Callable[[Pictures, Path, int], None]] = {
    "webdataset": _webdataset, "imagefolder": _imagefolder, "parquet": _parquet,
}  # fmt: skip


def _tables(folder: Path) -> Source:
    columns = Columns(image="image", text=("text",))
    return open_source("table", list(map(str, sorted(folder.glob("*.parquet")))), SourceOptions(columns=columns))[""]


_READERS: dict[str, Callable[[Path], Source]] = {
    "webdataset": lambda folder: open_source(
        "webdataset", str(folder), SourceOptions(columns=Columns(text=("captions",)))
    )[""],
    "imagefolder": lambda folder: open_source("imagefolder", str(folder))[""],
    "parquet": _tables,
    "tsv": lambda folder: next(iter(open_source("official", str(folder)).values())),
}
