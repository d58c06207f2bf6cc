"""A table with an image and one or more captions a row: CSV, TSV, JSONL, Excel, Parquet; the image as path or as bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.annotations import check_id, check_text
from data_tools.columns import kept_columns
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, content_origin, fingerprint_of, located
from data_tools.language import read_language
from data_tools.sources.beside_cells import beside_of
from data_tools.sources.column_names import TEXT_NAMES, Columns, known_for
from data_tools.sources.places import Root, readable
from data_tools.sources.rows import UNTYPED, RowFile
from data_tools.store import Id
from data_tools.store.layouts import canonical_id, is_id
from data_tools.text_files import AUTO
from data_tools.walk import is_picture


class TableSource:
    """Rows of `file`; image paths are relative to `root` (the table's folder).

    An image may stand on several rows: one caption each. Its id is that of the id column, else its path as written. Where
    the rows hold the bytes, equal bytes are one picture: its id is the path given with them (another picture of that
    name gets its own, see `ImageItem.own_name`), else ``row-<number>`` of the first. Texts are numbered from 1 unless
    there is an id column. Other columns are kept with the picture, as its first row has them.

    Args:
        header: False: the first row is data; columns are called 1, 2, … and the image is in 1, the text in 2.
        outside: whether paths may lead out of `root`.
        form: the ending that says what `file` is, where its name does not.

    Raises (on `open`):
        RequestError: no such file, an unknown kind, a missing column, or no header.
    """

    kind = "table"

    def __init__(
        self,
        file: Path,
        *,
        root: Path | None = None,
        columns: Columns | None = None,
        encoding: str = AUTO,
        header: bool = True,
        outside: bool = False,
        form: str | None = None,
    ) -> None:
        self.file, self.root = file, file.parent if root is None else root
        self.columns, self.encoding = columns or Columns(), encoding
        self.header, self.outside, self.form = header, outside, form
        if not header:
            self.columns = replace(self.columns, image=self.columns.image or "1", text=self.columns.text or ("2",))
        # 7 and "7" look the same there: it is the number
        self._untyped = (form or file.suffix.lower()) in UNTYPED
        self._found: str | None = None  # the encoding, once it was found out
        self._read_as: str | None = None

    def open(self) -> Stream:
        table = RowFile(
            self.file,
            self._found or self.encoding,
            header=self.header,
            form=self.form,
            wanted=self.columns.names_picture if self.header else lambda _: False,
        )
        if self.encoding == AUTO:
            self._found = table.encoding
        self._read_as = table.read_as
        if not self.root.is_dir():
            raise RequestError(f"{self.root}: no such folder of images")
        columns = None
        if table.columns is not None:
            if self.header and self._untyped:
                self._look_for_header(table.columns)
            columns = self._keeping(self.columns.resolve(table.columns, self.file), table)
        notes: list[str] = [*table.notes, *([self._said(columns)] if columns else [])]
        items = _Rows(self, table, columns, notes)
        return Stream(iter(items), total=table.total, unit=table.unit, tell=lambda: table.tell(), notes=notes)

    def _said(self, columns: Columns) -> str:
        return f"{readable(self.file.name)}: {columns.in_words(self._read_as)}"

    def _keeping(self, columns: Columns, table: RowFile) -> Columns:
        """Without those to keep that hold no plain values, where the file says so."""
        if self.columns.keep is not None or table.plain is None:
            return columns
        return replace(columns, keep=tuple(name for name in columns.keep or () if name in table.plain))

    def _look_for_header(self, names: list[str]) -> None:
        """Raises:
        RequestError: the first line holds a picture's path, or names one and no column of texts.
        """
        for number, cell in enumerate(names, start=1):
            if not (is_picture(cell) and len(cell) < 4096 and "\0" not in cell):
                continue
            if _exists(self.root, cell) or not any(known_for(name, TEXT_NAMES) for name in names):
                others = [n for n in range(1, len(names) + 1) if n != number]
                other = max(others, key=lambda n: len(names[n - 1]), default=2)  # a caption is longer than a code
                raise RequestError(
                    f"{self.file}: the first line has to name the columns (a header like image,text), and it holds the picture "
                    f"{cell!r}. Add such a line, or add --no-header --image-column {number} --text-column {other}."
                )

    def fingerprint(self) -> dict[str, Any]:
        return {
            "files": fingerprint_of(self.file),
            "root": str(self.root.resolve()),
            "columns": list(map(str, vars(self.columns).values())),
            "reading": [self.encoding, self.header, self.outside],
        }

    def expected(self) -> dict[str, int]:
        return {}


def _exists(root: Path, name: str) -> bool:
    try:
        return Root(root, outside=True).find(name)[0].is_file()
    except (DataFault, OSError, ValueError):
        return False


class _Rows:
    """The items of one sweep over a table."""

    def __init__(self, source: TableSource, table: RowFile, columns: Columns | None, notes: list[str]) -> None:
        self.source, self.table, self.columns, self.notes = source, table, columns, notes
        self.root = Root(source.root, source.outside)
        self.texts = self.blanks = 0
        self.nameless: dict[str, int] = {}  # content → the row it came on first

    def __iter__(self) -> Iterator[Item]:
        file = self.source.file
        wanted = [*self.columns.used(), *(self.columns.keep or ())] if self.columns else None
        for number, row in self.table.rows(wanted):
            if isinstance(row, DataFault):
                yield row
                continue
            if self.columns is None:  # JSON: the first row speaks for all
                self.columns = self.source.columns.resolve(list(row), file)
                self.notes.append(self.source._said(self.columns))
            try:
                image, captions = self._row(row, self.columns, number)
                cells = [row.get(name) if name else None for name in self._beside(row, self.columns)]
                beside = beside_of(cells[0], cells[1], len(captions), self.source._untyped)
            except DataFault as fault:
                yield located(fault, file, number)
                continue
            yield image
            yield from self._texts(row, self.columns, image, captions, beside)
        self.notes += self.root.notes()
        if self.blanks:
            self.notes.append(f"{self.blanks:,} blank captions beside others of the same row were passed over")

    def _beside(self, row: dict[str, Any], columns: Columns) -> tuple[str | None, str | None]:
        """Columns of negatives and weights; in JSON a row may have fields the first had not."""
        if self.table.columns is not None:
            return columns.negatives, columns.weight
        asked = self.source.columns
        named = replace(columns, keep=asked.keep, negatives=asked.negatives, weight=asked.weight)
        return named.beside(list(row))

    def _texts(
        self,
        row: dict[str, Any],
        columns: Columns,
        image: ImageItem,
        captions: list[Any],
        beside: list[dict[str, Any] | None],
    ) -> Iterator[Item]:
        file, number = self.source.file, image.line
        given = [
            (text, found)
            for text, found in zip(captions, beside, strict=True)
            if not (text is None or (isinstance(text, str) and not text.strip()))
        ]
        if not given:
            mend = "Write a caption or drop the row."
            yield DataFault(
                "the text is empty" if captions else "the list of texts is empty",
                mend=mend,
                kind="empty-text",
                file=file,
                line=number,
                item_id=image.image_id,
            )
        self.blanks += len(captions) - len(given) if given else 0
        for text, found in given:
            self.texts += 1
            try:
                text_id = check_id(row[columns.text_id], columns.text_id) if columns.text_id else self.texts
                language = read_language(row.get(columns.language) if columns.language else None)
                own = columns.text_id is None
                text, ids = check_text(text), (image.image_id,)
                yield TextItem(text_id, text, ids, language, file, number, image.origin, own, found)
            except DataFault as fault:
                yield located(fault, file, number, image.image_id)

    def _row(self, row: dict[str, Any], columns: Columns, number: int) -> tuple[ImageItem, list[Any]]:
        untyped = self.source._untyped
        assert columns.image is not None, "resolved"
        for name in columns.used():
            if name not in row and name not in (*columns.text[1:], columns.negatives, columns.weight):
                raise DataFault(f"field {name!r} is missing", mend="Every row needs it.", kind="missing-field")
        content, image_id, origin = self._image(row[columns.image], number)
        if columns.image_id is not None:
            given = row[columns.image_id]
            image_id = check_id(canonical_id(given) if isinstance(given, str) and untyped else given, columns.image_id)
        captions: list[Any] = []
        for column in columns.text:
            cell = row.get(column)
            captions += cell if isinstance(cell, list) else [cell]
        if columns.text_id is not None:
            if len(captions) > 1:
                raise DataFault(
                    f"{len(captions)} texts share one text id", mend="Leave out --text-id-column.", kind="bad-field"
                )
            if isinstance(row[columns.text_id], str) and untyped:
                row[columns.text_id] = canonical_id(row[columns.text_id])
        image = ImageItem(
            check_id(image_id, "the image's name"), content, self.source.file, number, origin, columns.image_id is None
        )
        others: Iterable[str] = columns.keep or ()
        if (
            self.table.columns is None and self.source.columns.keep is None
        ):  # JSON: a row may have fields the first had not
            others = [name for name in row if name not in (*columns.used(), *self._beside(row, columns))]
        image.columns = kept_columns(row, others) or None
        return image, captions

    def _image(self, value: Any, number: int) -> tuple[bytes | Path, Id, str]:
        """A cell → (bytes or path, id, origin): a path, bytes, a data address, or {"bytes", "path"} as Hugging Face writes it."""
        name = None
        if isinstance(value, dict):
            name = value.get("path") if isinstance(value.get("path"), str) else None
            value = value["bytes"] if isinstance(value.get("bytes"), bytes) else name
        if isinstance(value, str) and value.strip().lower().startswith("data:"):
            value = _data_address(value.strip())
        if isinstance(value, bytes):
            origin = content_origin(value)
            return value, _name_of(name) or f"row-{self.nameless.setdefault(origin, number)}", origin
        if not isinstance(value, str) or not value.strip():
            shown = repr(value)[:60] if not isinstance(value, (dict, list)) else type(value).__name__
            raise DataFault(
                f"the image is {shown}", mend="It is the path of an image file, or its bytes.", kind="bad-field"
            )
        path, image_id = self.root.find(value)
        return path, image_id, str(path)


def _name_of(path: str | None) -> str | None:
    """The name that came with bytes: the path as written; of one that says where it lay on another machine, its last part."""
    path = path or ""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts:
        return None
    name = "/".join(parts)
    elsewhere = path.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or not is_id(name)
    return readable(PurePosixPath(name).name if elsewhere else name)


def _data_address(value: str) -> bytes:
    kind, comma, data = value.partition(",")
    if not comma or not kind.lower().endswith(";base64"):
        raise DataFault(
            f"the data address {value[:40]!r} is not base64", mend="Write data:image/jpeg;base64,….", kind="bad-base64"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataFault(
            f"the data address is not base64 ({error})", mend="Encode the image again.", kind="bad-base64"
        ) from None
