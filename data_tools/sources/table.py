"""A table with an image and one or more captions a row: CSV, TSV, JSONL, Parquet; the image as path or as bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.annotations import check_id, check_text
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, fingerprint_of, located
from data_tools.language import read_language
from data_tools.sources.rows import RowFile
from data_tools.store import Id
from data_tools.store.layouts import canonical_id

IMAGE_NAMES = (
    "image",
    "image_path",
    "file_name",
    "filename",
    "path",
    "file",
    "filepath",
    "img",
    "image_file",
    "图片",
    "图像",
)
TEXT_NAMES = (
    "text",
    "caption",
    "captions",
    "texts",
    "title",
    "description",
    "sentence",
    "query",
    "描述",
    "标题",
    "文本",
)


@dataclass(frozen=True)
class Columns:
    """Which column is what; None is looked for among the usual names."""

    image: str | None = None
    text: tuple[str, ...] = ()
    image_id: str | None = None
    text_id: str | None = None
    language: str | None = None

    def resolve(self, names: list[str], file: Path) -> Columns:
        """The columns of a table whose header is `names`.

        Raises:
            RequestError: a column is not there, or none can be guessed.
        """
        return Columns(
            image=_one(self.image, IMAGE_NAMES, names, file, "image", "--image-column"),
            text=tuple(_one(name, (), names, file, "text", "--text-column") for name in self.text)
            or (_one(None, TEXT_NAMES, names, file, "text", "--text-column"),),
            image_id=self.image_id if self.image_id is None else _one(self.image_id, (), names, file, "id", "--image-id-column"),
            text_id=self.text_id if self.text_id is None else _one(self.text_id, (), names, file, "id", "--text-id-column"),
            language=_one(self.language, (), names, file, "language", "--language-column") if self.language
            else "language" if "language" in names else None,
        )  # fmt: skip

    def as_list(self) -> list[str]:
        single = (self.image, self.image_id, self.text_id, self.language)
        return [name for name in (*single, *self.text) if name]


def _one(name: str | None, usual: tuple[str, ...], names: list[str], file: Path, what: str, flag: str) -> str:
    if name is None:
        lower = {known.lower(): known for known in reversed(names)}
        name = next((lower[known] for known in usual if known in lower), None)
    if name not in names:
        wanted = f"no column {name!r}" if name else f"none of the columns is known to hold the {what}"
        raise RequestError(f"{file}: {wanted}; there are {', '.join(map(repr, names)) or 'none'}. Name it with {flag}.")
    return name


class TableSource:
    """Rows of `file`; image paths are relative to `root` (the table's folder).

    An image may stand on several rows: one caption each. Its id is that of the id column, else its path as written,
    else (bytes without a name) ``row-<number>``. Texts are numbered from 1 unless there is an id column.

    Raises (on `open`):
        RequestError: no such file, an unknown kind, a missing column.
    """

    kind = "table"

    def __init__(
        self, file: Path, *, root: Path | None = None, columns: Columns | None = None, encoding: str = "utf-8"
    ) -> None:
        self.file, self.root = file, file.parent if root is None else root
        self.columns, self.encoding = columns or Columns(), encoding
        self._untyped = file.suffix.lower() in (".csv", ".tsv")  # 7 and "7" look the same there: it is the number

    def open(self) -> Stream:
        table = RowFile(self.file, self.encoding)
        if not self.root.is_dir():
            raise RequestError(f"{self.root}: no such folder of images")
        columns = self.columns.resolve(table.columns, self.file) if table.columns is not None else None
        return Stream(self._items(table, columns), total=table.total, unit=table.unit, tell=lambda: table.tell())

    def _items(self, table: RowFile, columns: Columns | None) -> Iterator[Item]:
        text_number = 0
        for number, row in table.rows(columns.as_list() if columns else None):
            if isinstance(row, DataFault):
                yield row
                continue
            if columns is None:  # JSONL: the first row speaks for all
                columns = self.columns.resolve(list(row), self.file)
            try:
                image, captions = self._row(row, columns, number)
            except DataFault as fault:
                yield located(fault, self.file, number)
                continue
            yield image
            for text in captions:
                text_number += 1
                try:
                    yield TextItem(
                        check_id(row[columns.text_id], columns.text_id) if columns.text_id else text_number,
                        check_text(text), (image.image_id,), read_language(row.get(columns.language) if columns.language else None),
                        self.file, number,
                    )  # fmt: skip
                except DataFault as fault:
                    yield located(fault, self.file, number, image.image_id)

    def _row(self, row: dict[str, Any], columns: Columns, number: int) -> tuple[ImageItem, list[Any]]:
        for name in columns.as_list():
            if name not in row:
                raise DataFault(f"field {name!r} is missing", mend="Every row needs it.", kind="missing-field")
        content, name = _image(row[columns.image], self.root)
        image_id: Id = name or f"row-{number}"
        if columns.image_id is not None:
            given = row[columns.image_id]
            image_id = check_id(
                canonical_id(given) if isinstance(given, str) and self._untyped else given, columns.image_id
            )
        captions: list[Any] = []
        for column in columns.text:
            captions += row[column] if isinstance(row[column], list) else [row[column]]
        if columns.text_id is not None and len(captions) > 1:
            raise DataFault(
                f"{len(captions)} texts share one text id", mend="Leave out --text-id-column.", kind="bad-field"
            )
        if columns.text_id is not None and isinstance(row[columns.text_id], str) and self._untyped:
            row[columns.text_id] = canonical_id(row[columns.text_id])
        return ImageItem(check_id(image_id, "the image's name"), content, self.file, number, origin=name), captions

    def fingerprint(self) -> dict[str, Any]:
        return {
            "files": fingerprint_of(self.file),
            "root": str(self.root.resolve()),
            "columns": list(map(str, vars(self.columns).values())),
        }

    def expected(self) -> dict[str, int]:
        return {}


def _image(value: Any, root: Path) -> tuple[bytes | Path, str | None]:
    """A cell → (bytes or path, name): a path, bytes, a data address, or {"bytes", "path"} as Hugging Face writes it."""
    if isinstance(value, dict):
        name = value.get("path") if isinstance(value.get("path"), str) else None
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"], PurePosixPath(name.replace("\\", "/")).name if name else None
        value = name
    if isinstance(value, bytes):
        return value, None
    if not isinstance(value, str) or not value.strip():
        raise DataFault(
            f"the image is {value!r:.60}", mend="It is the path of an image file, or its bytes.", kind="bad-field"
        )
    value = value.strip()
    if value.startswith("data:image/"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True), None
        except binascii.Error as error:
            raise DataFault(
                f"the data address is not base64 ({error})", mend="Encode the image again.", kind="bad-base64"
            ) from None
    if value.startswith(("http://", "https://", "s3://", "gs://")):
        raise DataFault(
            f"the image is an address ({value[:60]})", mend="Download it and write its path.", kind="remote-image"
        )
    name = value.replace("\\", "/").removeprefix("./")
    return root / name, name
