"""The forms a store is exported in: tars for WebDataset, a Hugging Face imagefolder, Parquet, the official source files, a store.

Each is a writer into a new folder, and the source that reads the folder back.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.bars import Bar
from data_tools.build import build_store
from data_tools.errors import RequestError
from data_tools.items import Source
from data_tools.selection import ENDING_OF, Picture, Pictures, Selection
from data_tools.shards import open_pairs
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.sources.stored import StoreSource
from data_tools.store import Id, PairSource
from data_tools.walk import ending_of

_A_FILE = 5000  # pictures in a tar or Parquet file
_ROWS = 64  # of Parquet at once


@dataclass
class Exported:
    """What was written."""

    images: int
    pairs: int
    notes: list[str] = field(default_factory=list)


Writer = Callable[[PairSource, Selection, Path, "int | None", bool], Exported]


@dataclass(frozen=True)
class Form:
    """How a part of a store is written (`shard_size` and `progress` come last), and how the folder is read back.

    Args:
        alone: whether there is a place for pictures without a text and texts without a picture.
        columns: whether there is one for kept columns. beside: for what pairs have beside their texts.
    """

    write: Writer
    read: Callable[[Path], Source]
    alone: bool = False
    columns: bool = True
    beside: bool = False


def _with_texts(write: Callable[[Pictures, Path, int], None]) -> Writer:
    """The writer of a form that has a place for pictures with texts only."""

    def writer(store: PairSource, chosen: Selection, folder: Path, size: int | None, progress: bool) -> Exported:
        pictures = Pictures(store, chosen, progress)
        if not pictures.ids:
            by = f" by {chosen.where}" if chosen.where else ""
            raise RequestError(f"{store.path}: no picture with a text is chosen{by}")
        write(pictures, folder, size or _A_FILE)
        done = Exported(len(pictures.ids), pictures.pairs)
        if pictures.without:
            done.notes.append(f"{pictures.without:,} pictures without a text are left out")
        if store.lone_texts:
            done.notes.append(
                f"{len(store.lone_texts):,} texts without a picture are left out: this form has no place for them"
            )
        return done

    return writer


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
        about = {"image_id": picture.image_id, "captions": [pair.text for pair in picture.texts], **picture.about()}
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
            row = {"file_name": f"images/{name}", "text": _captions(picture, pictures.single), **picture.about()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _file_name(picture: Picture, taken: set[str]) -> str:
    """The id where it is the path of a picture that any system can write, else the number."""
    name = str(picture.image_id)
    parts = PurePosixPath(name).parts
    plain = all(
        part not in (".", "..", "/") and len(part.encode()) <= 200 and not part.startswith(".") for part in parts
    )
    plain = plain and not any(ord(mark) < 32 or mark in '\\:*?"<>|' for mark in name) and "/".join(parts) == name
    right = ENDING_OF.get(
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
    schema = arrow.schema(
        own + [(name, arrow.string()) for name in ("image_id", "language", *pictures.chosen.names(pictures.store))]
    )
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
        row = {
            "image": {"bytes": picture.data, "path": f"{picture.key}.{picture.ending}"},
            "text": _captions(picture, pictures.single),
            "image_id": str(picture.image_id),
            "language": picture.language,
        }
        rows.append(row | {name: str(value) for name, value in picture.columns.items()})
        if len(rows) == _ROWS:
            flush()
    flush()
    writer.close()


def _chosen(store: PairSource, chosen: Selection) -> list[Id]:
    """The pictures of a form that has a place for pictures and texts alone.

    Raises:
        RequestError: no text is chosen.
    """
    ids = chosen.pictures(store, bool(chosen.languages))
    known = set(ids)
    if not any(pair.image_id in known and chosen.keeps_pair(pair) for pair in store.pairs()) and not (
        chosen.whole and store.lone_texts
    ):
        raise RequestError(f"{store.path}: no pair is chosen")
    return ids


def _official_files(store: PairSource, chosen: Selection, folder: Path, size: int | None, progress: bool) -> Exported:
    """``<name>_imgs.tsv`` and ``<name>_texts.jsonl``, as the official scripts read them; words for ids are numbered."""
    name, ids = store.name, _chosen(store, chosen)
    done = Exported(len(ids), 0)
    words = any(isinstance(image_id, str) for image_id in ids)
    number_of: dict[Id, Id] = (
        {image_id: number for number, image_id in enumerate(ids, 1)} if words else {i: i for i in ids}
    )
    with (folder / f"{name}_imgs.tsv").open("wb") as file:
        for image_id in Bar(ids, desc="writing", unit="image", shown=progress, delay=1.0):
            file.write(b"%s\t%s\n" % (str(number_of[image_id]).encode(), base64.b64encode(store.image(image_id))))
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


def _store(layout: str) -> Writer:
    def writer(store: PairSource, chosen: Selection, folder: Path, size: int | None, progress: bool) -> Exported:
        source = StoreSource(
            store.path,
            keep=set(_chosen(store, chosen)).__contains__,
            keep_pair=chosen.keeps_pair,
            lone=chosen.whole,
            columns=chosen.columns,
            open_place=open_pairs,
        )
        report = build_store(source, folder, layout=layout, shard_size=size, progress=progress)
        report.store.close()  # Windows renames no open file
        return Exported(report.images, report.pairs, report.notes)

    return writer


def _read_tars(folder: Path) -> Source:
    return open_source("webdataset", str(folder), SourceOptions(columns=Columns(text=("captions",))))[""]


def _read_tables(folder: Path) -> Source:
    columns = Columns(image="image", text=("text",))
    return open_source("table", list(map(str, sorted(folder.glob("*.parquet")))), SourceOptions(columns=columns))[""]


FORMS = {
    "webdataset": Form(_with_texts(_webdataset), _read_tars),
    "imagefolder": Form(_with_texts(_imagefolder), lambda folder: open_source("imagefolder", str(folder))[""]),
    "parquet": Form(_with_texts(_parquet), _read_tables),
    "tsv": Form(
        _official_files,
        lambda folder: next(iter(open_source("official", str(folder)).values())),
        alone=True,
        columns=False,
    ),
    "official": Form(_store("official"), StoreSource, alone=True, beside=True),
    "store": Form(_store("plain"), StoreSource, alone=True, beside=True),
}
