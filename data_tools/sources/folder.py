"""A folder of images with captions: in ``captions.csv``/``.tsv``/``.jsonl``, or in one ``.txt`` beside each image.

A table has a header with a column for the file (``file``, ``file_name``, ``filename``, ``image``, ``image_path`` or
``path``, relative to the folder) and one for the text (``caption``, ``text``, ``caption_zh``, ``sentence``); several
lines may name one image. ``file_name`` is what a Hugging Face imagefolder's ``metadata.csv``/``.jsonl`` calls it. In a
``.txt`` every line is a caption. The path inside the folder becomes the image id.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import TextRecord, detect_language, read_lines
from data_tools.build import BuildSummary, ImageRecord, build_store
from data_tools.errors import DataFault, RequestError

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_path", "path")
TEXT_COLUMNS = ("caption", "text", "caption_zh", "sentence")
TABLES = tuple(f"{name}.{ending}" for name in ("captions", "metadata") for ending in ("csv", "tsv", "jsonl"))


def import_folder(folder: str | Path, target: str | Path, *, captions: str | Path | None = None, **options) -> BuildSummary:
    """Build a store from a folder.

    Args:
        captions: the table, where it is not one of the usual names in the folder.
        options: as `build_store`.

    Raises:
        RequestError: no folder, no images, or no captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    table = find_table(folder, captions)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS and p.is_file())
    if not files:
        raise RequestError(f"{folder}: no images in it (looked for {', '.join(sorted(IMAGE_ENDINGS))})")
    if table is None and not any(file.with_suffix(".txt").is_file() for file in files):
        raise RequestError(
            f"{folder}: no captions found: neither {', '.join(TABLES)} nor a .txt beside an image. "
            "Name the table with --captions FILE."
        )
    texts = table_texts(table, folder) if table else beside_texts(files, folder)
    return build_store(_images(files, folder), texts, Path(target), texts_file=table or folder, **options)


def find_table(folder: Path, captions: str | Path | None) -> Path | None:
    if captions is not None:
        path = Path(captions)
        if not path.is_file():
            raise RequestError(f"{path}: no such file (--captions)")
        if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
            raise RequestError(f"{path}: captions come as .csv, .tsv or .jsonl")
        return path
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise RequestError(f"{folder}: both {found[0].name} and {found[1].name} are there; choose with --captions FILE")
    return found[0] if found else None


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _images(files: list[Path], folder: Path) -> Iterator[ImageRecord | DataFault]:
    for file in files:
        try:
            yield ImageRecord(_name(file, folder), file.read_bytes(), str(file))
        except OSError as error:
            yield DataFault(f"cannot be read ({error.strerror})", mend="Check its permissions.", kind="unreadable", file=file)


def beside_texts(files: list[Path], folder: Path) -> Iterator[TextRecord | DataFault]:
    """Captions in ``name.txt`` beside ``name.jpg``, one a line."""
    number = 0
    for file in files:
        beside = file.with_suffix(".txt")
        if not beside.is_file():
            yield DataFault("no .txt beside it", mend=f"Write its captions into {beside.name}.", kind="no-caption", file=file)
            continue
        for line_number, line in read_lines(beside):
            if isinstance(line, DataFault):
                yield line
            elif line.strip():
                yield _record(number, line.strip(), _name(file, folder), None, line_number)
                number += 1


def _record(number: int, text: str, image: str, language: str | None, line: int) -> TextRecord:
    return TextRecord(number, text, (image,), language or detect_language(text), line)


def table_texts(path: Path, folder: Path) -> Iterator[TextRecord | DataFault]:
    """Captions of a CSV, TSV or JSONL table; text ids are line numbers."""
    rows = _jsonl_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
    for number, row in rows:
        if isinstance(row, DataFault):
            yield row
            continue
        try:
            file, text = _cell(row, FILE_COLUMNS, path, number), _cell(row, TEXT_COLUMNS, path, number)
        except DataFault as fault:
            yield fault
            continue
        image = file.replace("\\", "/").removeprefix("./")
        if Path(file).is_absolute():
            try:
                image = Path(file).relative_to(folder.resolve()).as_posix()
            except ValueError:
                yield DataFault(f"{file} lies outside {folder}", mend="Name images by their path inside the folder.",
                                kind="missing-image", file=path, line=number)  # fmt: skip
                continue
        language = row.get("language")
        yield _record(number, text, image, language if isinstance(language, str) and language else None, number)


def _cell(row: dict[str, Any], names: tuple[str, ...], path: Path, number: int) -> str:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise DataFault(f"none of the fields {', '.join(names)} (found: {', '.join(map(str, row)) or 'nothing'})",
                        mend="Add one of them.", kind="missing-field", file=path, line=number)  # fmt: skip
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise DataFault(f"{name} is {value!r}", mend="Write a text that is not empty.", kind="bad-text", file=path, line=number)
    return value.strip()


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataFault]]:
    for number, line in read_lines(path):
        if isinstance(line, DataFault):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else DataFault(
                "not a JSON object", mend="Write one JSON object a line.", kind="bad-json", file=path, line=number
            )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataFault]]:
    faults: list[tuple[int, DataFault]] = []

    def lines() -> Iterator[str]:
        for number, line in read_lines(path):
            if isinstance(line, DataFault):
                faults.append((number, line))
            else:
                yield line + "\n"

    reader = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        for names in (FILE_COLUMNS, TEXT_COLUMNS):
            if not set(names) & set(header):
                raise RequestError(f"{path}:1: no column of {', '.join(names)} in the header (found: {', '.join(header) or 'nothing'})")
        for cells in reader:
            yield from faults
            faults.clear()
            if len(cells) > len(header):
                yield reader.line_num, DataFault(f"{len(cells)} columns, the header has {len(header)}", kind="bad-line", file=path,
                                                 line=reader.line_num, mend='Put texts with separators into "quotes".')  # fmt: skip
            elif any(cells):
                yield reader.line_num, dict(zip(header, cells, strict=False))
        yield from faults
    except csv.Error as error:
        raise DataFault(f"not readable as a table ({error})", mend="Export it again as CSV or TSV.", kind="bad-line", file=path,
                        line=reader.line_num) from None  # fmt: skip
