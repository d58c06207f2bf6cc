"""Rows of a table file, one dict each: CSV, TSV, JSONL, Parquet. A bad row becomes a fault."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.annotations import decode_line, parse_json, read_lines
from data_tools.errors import DataFault, RequestError
from data_tools.items import located

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_BUFFER = 2**20
_LONGEST_ROW = 4 * 2**20  # bytes; a caption, not a picture
_PARQUET_ROWS = 64

Row = tuple[int, "dict[str, Any] | DataFault"]


class RowFile:
    """A table file opened for one sweep: `columns` (None where every row names its own), `rows`, and `tell` for progress.

    Args:
        wanted: chooses the columns to read from those there are (Parquet reads no others).
        encoding: of CSV, TSV and JSONL.

    Raises:
        RequestError: no such file, an unknown kind, no header, or pyarrow is missing.
    """

    def __init__(self, file: Path, encoding: str = "utf-8") -> None:
        if not file.is_file():
            raise RequestError(f"{file}: no such file")
        if file.suffix.lower() not in SUFFIXES:
            raise RequestError(f"{file}: a table is one of {', '.join(SUFFIXES)}")
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise RequestError(f"--encoding {encoding!r} is not known; try utf-8 or gb18030") from None
        self.file, self.encoding = file, encoding
        self.total, self.unit = file.stat().st_size, "B"
        self.tell: Callable[[], int] = lambda: 0
        self._delimiter = ","
        if file.suffix.lower() == ".parquet":
            self._parquet = _open_parquet(file)
            self.columns: list[str] | None = list(self._parquet.schema_arrow.names)
            self.total, self.unit = self._parquet.metadata.num_rows, "row"
        elif file.suffix.lower() in (".csv", ".tsv"):
            self.columns = self._header()
        else:
            self.columns = None

    def _header(self) -> list[str]:
        with self.file.open("rb") as handle:
            line = next((line for _, line in read_lines(handle, self.file, _LONGEST_ROW)), b"")
        try:
            if isinstance(line, DataFault):
                raise line
            text = self._decode(line)
        except DataFault as fault:
            raise RequestError(str(located(fault, self.file, 1))) from None
        if self.file.suffix.lower() == ".tsv":
            self._delimiter = "\t"
        elif ";" in text and "," not in text:
            self._delimiter = ";"  # Excel where the comma is the decimal mark
        elif "\t" in text and "," not in text:
            self._delimiter = "\t"
        return [name.strip() for name in next(csv.reader([text], **self._dialect()), [])]

    def _dialect(self) -> dict[str, Any]:
        # A tab-separated caption may begin with a quotation mark, and nobody doubles it there.
        quoting = csv.QUOTE_NONE if self._delimiter == "\t" else csv.QUOTE_MINIMAL
        return {"delimiter": self._delimiter, "quoting": quoting, "strict": True}

    def _decode(self, line: bytes) -> str:
        if self.encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
            return decode_line(line)
        try:
            return line.decode(self.encoding)
        except UnicodeDecodeError as error:
            raise DataFault(
                f"the line is not {self.encoding} ({error.reason})", mend="Name its --encoding.", kind="not-utf8"
            ) from None

    def rows(self, wanted: list[str] | None = None) -> Iterator[Row]:
        """(line or row number, row or fault); numbers count from 1 as an editor does, the header included."""
        suffix = self.file.suffix.lower()
        if suffix == ".parquet":
            yield from self._parquet_rows(wanted)
            return
        with self.file.open("rb", buffering=_BUFFER) as handle:
            self.tell = lambda: self.total if handle.closed else handle.tell()
            for number, row in self._csv_rows(handle) if suffix in (".csv", ".tsv") else self._json_rows(handle):
                yield number, located(row, self.file, number) if isinstance(row, DataFault) else row

    def _json_rows(self, handle: BinaryIO) -> Iterator[Row]:
        for number, line in read_lines(handle, self.file):
            try:
                if isinstance(line, DataFault):
                    raise line
                row = parse_json(self._decode(line).encode("utf-8"))
                if not isinstance(row, dict):
                    raise DataFault(
                        f"the line is {type(row).__name__}, not an object",
                        mend='Write {"image": …, "text": …}.',
                        kind="bad-json",
                    )
            except DataFault as fault:
                yield number, fault
            else:
                yield number, row

    def _csv_rows(self, handle: BinaryIO) -> Iterator[Row]:
        faults: list[tuple[int, DataFault]] = []
        last = [0]

        def lines() -> Iterator[str]:
            for number, line in _raw_lines(handle):
                last[0] = number
                try:
                    yield self._decode(line)
                except DataFault as fault:
                    faults.append((number, fault))
                    yield line.decode("utf-8", "replace")  # keeps quotes and commas; the row is refused below

        reader, names = csv.reader(lines(), **self._dialect()), None
        while True:
            first = last[0] + 1
            faults.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                many = f" (lines {first} to {last[0]} are lost by it)" if last[0] > first else ""
                yield first, DataFault(f"broken row: {error}{many}", mend="Close every quotation mark.", kind="bad-csv")
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if faults:
                yield faults[0]
            elif names is None:
                names = self.columns
            elif len(cells) != len(names):
                yield first, DataFault(
                    f"{len(cells)} cells, the header has {len(names)}: {cells[:4]}",
                    mend="Put a cell that holds a separator in quotation marks.", kind="bad-csv",
                )  # fmt: skip
            else:
                yield first, dict(zip(names, cells, strict=True))

    def _parquet_rows(self, wanted: list[str] | None) -> Iterator[Row]:
        number = 0
        self.tell = lambda: number
        try:
            for batch in self._parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (OSError, ValueError) as error:  # what pyarrow raises for damaged pages
            yield number + 1, DataFault(f"Parquet cannot be read on ({error})", mend="Write the file again.", kind="bad-parquet",
                                        file=self.file, line=number + 1)  # fmt: skip


def _raw_lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines with their ends: a quoted cell may span several."""
    for number, line in enumerate(iter(lambda: handle.readline(_LONGEST_ROW), b""), start=1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _open_parquet(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError("Parquet needs pyarrow: pip install 'cnclip-ft[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise RequestError(f"{file} is not a readable Parquet file ({error})") from None
