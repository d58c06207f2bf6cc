"""Rows of a table file, one dict each: CSV, TSV, JSONL, JSON, Excel, Parquet. A bad row becomes a fault and costs itself only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import parse_json
from data_tools.errors import DataFault, RequestError
from data_tools.items import located
from data_tools.regular import regular
from data_tools.sources.json_rows import read_json
from data_tools.sources.separated import Dialect, find_dialect, records
from data_tools.sources.sheet import Sheet
from data_tools.text_files import AUTO, TextFile

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")
UNTYPED = (".csv", ".tsv", ".xlsx")  # every cell is text
_SEPARATED, _LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")
_TO_CONVERT = (".xls", ".xlsb", ".ods", ".numbers", ".et")
_PARQUET_ROWS = 64

Row = tuple[int, "dict[str, Any] | DataFault"]


class RowFile:
    """A table file opened for one sweep: `columns` (None where every row names its own), `rows`, and `tell` for progress.

    Args:
        encoding: of CSV, TSV, JSONL and JSON; `AUTO` finds it.
        header: False: the first row of a CSV, TSV or Excel file is data, and its columns are called 1, 2, ….
        form: the ending that says what it is, where the name's does not.
        wanted: whether a cell names a column that is looked for: the sheet of an Excel file that has one is read.

    Attributes:
        encoding: as it was found. read_as: the same for people; None: a file of another kind than text. plain: columns of texts, numbers, dates; None: all, or it is not known.

    Raises:
        RequestError: no such file, an unknown kind, no header, or a package is missing.
    """

    def __init__(
        self,
        file: Path,
        encoding: str = AUTO,
        *,
        header: bool = True,
        form: str | None = None,
        wanted: Callable[[str], bool] = lambda _: False,
    ) -> None:
        size = regular(file)
        self.form = form or file.suffix.lower()
        if self.form not in SUFFIXES:
            mend = "; open it there and save it as .xlsx or CSV" if self.form in _TO_CONVERT else ""
            if self.form in (".token", ".txt"):
                mend = f". Lines of captions beside pictures: cnclip-ft data import folder PICTURES --captions {file}"
            raise RequestError(f"{file}: a table is one of {', '.join(SUFFIXES)}{mend}")
        if not header and self.form not in UNTYPED:
            raise RequestError(f"--no-header is for CSV, TSV and Excel; {file} names the fields itself")
        if encoding not in ("utf-8", AUTO) and self.form in (".xlsx", ".parquet"):
            raise RequestError(f"--encoding means nothing to {file}; leave it out")
        self.file, self.encoding, self.header = file, encoding, header
        self.total: int | None = size
        self.unit = "B"
        self.tell: Callable[[], int] = lambda: 0
        self.columns: list[str] | None = None
        self.plain: list[str] | None = None
        self.notes: list[str] = []
        self.read_as: str | None = None
        if self.form == ".parquet":
            self._parquet = open_parquet(file)
            self.columns = list(self._parquet.schema_arrow.names)
            self.plain = [field.name for field in self._parquet.schema_arrow if _is_plain(field.type)]
            self.total, self.unit = self._parquet.metadata.num_rows, "row"
        elif self.form == ".json":
            self.columns, self._json, self.read_as = read_json(file, encoding)
            self.total, self.unit = len(self._json), "row"
        elif self.form == ".xlsx":
            self._sheet = Sheet(file, wanted)
            self.notes += self._sheet.notes
            self.total, self.unit = self._sheet.total, "row"
            self.columns = self._named(next(self._sheet.rows(), (1, []))[1])
        else:
            with TextFile(file, encoding) as text:
                self.encoding, self.read_as = text.found, text.read_as
        if self.form in _SEPARATED:
            self._dialect = self._find_dialect()
            self.columns = self._names()

    def _find_dialect(self) -> Dialect:
        with TextFile(self.file, self.encoding) as text:
            dialect, said = find_dialect(text.raw, self.form)
        self.notes += said
        return dialect

    def _names(self) -> list[str]:
        with TextFile(self.file, self.encoding) as text:
            number, cells = next(records(text.raw(), self._dialect), (1, []))
        if isinstance(cells, DataFault):
            fault = located(cells, self.file, number)
            raise RequestError(f"{fault} The first line has to name the columns (or add --no-header).")
        return self._named(cells)

    def _named(self, cells: list[str]) -> list[str]:
        return [name.strip() for name in cells] if self.header else [str(n) for n in range(1, len(cells) + 1)]

    def rows(self, wanted: list[str] | None = None) -> Iterator[Row]:
        """(line or row number, row or fault); numbers count from 1 as an editor does, the header included.

        Args:
            wanted: the columns to read, where others cost something (Parquet).
        """
        if self.form == ".parquet":
            found = self._parquet_rows(wanted)
        elif self.form == ".json":
            found = self._json_rows()
        elif self.form == ".xlsx":
            found = self._sheet_rows()
        else:
            found = self._text_rows()
        for number, row in found:
            yield number, located(row, self.file, number) if isinstance(row, DataFault) else row

    def _json_rows(self) -> Iterator[Row]:
        number = 0
        self.tell = lambda: number
        for row in self._json:
            number += 1
            yield number, row if isinstance(row, (dict, DataFault)) else _no_object(row, "row")

    def _sheet_rows(self) -> Iterator[Row]:
        number, names, header = 0, self.columns or [], self.header
        self.tell = lambda: number
        for number, cells in self._sheet.rows():
            if header:
                header = False
            elif any(cells[len(names) :]):
                yield (
                    number,
                    DataFault(
                        f"{len(cells)} cells, the header has {len(names)}",
                        mend="Give every column a name.",
                        kind="bad-row",
                    ),
                )
            else:
                yield number, dict(zip(names, cells + [""] * (len(names) - len(cells)), strict=False))

    def _text_rows(self) -> Iterator[Row]:
        with TextFile(self.file, self.encoding) as text:
            self.tell = text.tell
            yield from self._line_rows(text) if self.form in _LINES else self._separated_rows(text)

    def _line_rows(self, text: TextFile) -> Iterator[Row]:
        for number, line in text.lines():
            try:
                row = line if isinstance(line, DataFault) else parse_json(line)
            except DataFault as fault:
                row = fault
            yield number, row if isinstance(row, (dict, DataFault)) else _no_object(row, "line")

    def _separated_rows(self, text: TextFile) -> Iterator[Row]:
        names, header = self.columns or [], self.header
        for number, cells in records(text.raw(), self._dialect):
            if isinstance(cells, DataFault):
                yield number, cells
            elif header:
                header = False
            elif len(cells) != len(names):
                yield (
                    number,
                    DataFault(
                        f"{len(cells)} cells, the {'header' if self.header else 'first row'} has {len(names)}: {[cell[:60] for cell in cells[:4]]}",
                        mend="Put a cell that holds a separator in quotation marks.",
                        kind="bad-csv",
                    ),
                )
            else:
                yield number, dict(zip(names, cells, strict=True))

    def _parquet_rows(self, wanted: list[str] | None) -> Iterator[Row]:
        number, bad = 0, parquet_errors()
        self.tell = lambda: number
        for group in range(self._parquet.num_row_groups):
            end = number + self._parquet.metadata.row_group(group).num_rows
            try:
                batches = self._parquet.iter_batches(
                    _PARQUET_ROWS, row_groups=[group], columns=wanted, use_threads=False
                )
                for batch in batches:
                    for row in _batch_rows(batch, bad):
                        number += 1
                        yield number, row
            except bad as error:
                # The pages of a group cannot be told apart: each of its rows that did not come is a fault.
                while number < end:
                    number += 1
                    yield (
                        number,
                        DataFault(
                            f"this part of the Parquet cannot be read ({_first_line(error)})",
                            mend="Write the file again.",
                            kind="bad-parquet",
                        ),
                    )


def _batch_rows(batch: Any, bad: tuple[type[Exception], ...]) -> Iterator[dict[str, Any] | DataFault]:
    try:
        yield from batch.to_pylist()
        return
    except bad:
        pass
    for at in range(batch.num_rows):
        row: dict[str, Any] = {}
        fault: DataFault | None = None
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[at].as_py()
            except bad as error:
                text = isinstance(error, UnicodeDecodeError)
                fault = DataFault(
                    f"column {name!r} {'is not UTF-8' if text else 'cannot be read'} ({_first_line(error)})",
                    mend="Write the row again.",
                    kind="not-utf8" if text else "bad-field",
                )
                break
        yield row if fault is None else fault


def _is_plain(kind: Any) -> bool:
    """Whether cells of this type of Arrow are texts, numbers, dates."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = types.is_string(kind) or types.is_large_string(kind)
    return bool(
        texts
        or types.is_boolean(kind)
        or types.is_temporal(kind)
        or (types.is_primitive(kind) and not types.is_null(kind))
    )


def _first_line(error: Exception) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200]


def _no_object(row: Any, what: str) -> DataFault:
    return DataFault(
        f"the {what} is {type(row).__name__}, not an object", mend='Write {"image": …, "text": …}.', kind="bad-json"
    )


def parquet_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for damaged pages and for values that have no Python form."""
    import pyarrow

    return OSError, ValueError, OverflowError, TypeError, KeyError, MemoryError, pyarrow.ArrowException


def open_parquet(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError("Parquet needs pyarrow: pip install 'cnclip-ft[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RequestError(f"{file} is not a readable Parquet file ({_first_line(error)})") from None
