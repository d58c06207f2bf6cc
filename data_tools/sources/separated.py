"""Records of CSV and TSV: a broken one costs its first line only, and reading goes on behind it."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.errors import DataFault
from data_tools.text_files import LONGEST_LINE

_LONGEST_RECORD = 4 * 2**20  # characters, where it spans lines; an open quotation mark would swallow the file
_JUDGED = 10_000  # records with quotation marks
_SEPARATORS = ",;\t|"
_WELL_QUOTED = re.compile(r'(?:"(?:[^"]|"")*"|[^"\t\r\n]*)(?:\t(?:"(?:[^"]|"")*"|[^"\t\r\n]*))*[\r\n]*')

Line = tuple[int, "str | DataFault"]


@dataclass(frozen=True)
class Dialect:
    """How cells are set apart, and whether quotation marks around a cell are part of it."""

    separator: str
    quoted: bool = True

    def reader(self, lines: Iterator[str]) -> Any:
        csv.field_size_limit(LONGEST_LINE)
        return csv.reader(
            lines,
            delimiter=self.separator,
            strict=True,
            skipinitialspace=self.separator == "|",
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
        )


class _LineIsBad(Exception):
    pass


def records(lines: Iterator[Line], dialect: Dialect) -> Iterator[tuple[int, list[str] | DataFault]]:
    """(number of its first line, cells or fault) of every record that is not blank."""
    for used, cells in _records(lines, dialect):
        yield used[0][0], cells


def _records(lines: Iterator[Line], dialect: Dialect) -> Iterator[tuple[list[Line], list[str] | DataFault]]:
    waiting: deque[Line] = deque()

    def feed(used: list[Line]) -> Iterator[str]:
        length = 0
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            used.append(line)
            if isinstance(line[1], DataFault):
                raise _LineIsBad
            length += len(line[1])
            if used[1:] and length > _LONGEST_RECORD:
                raise csv.Error(f"a record longer than {_LONGEST_RECORD >> 20} MiB")
            yield line[1]

    while True:
        used: list[Line] = []
        try:
            cells = next(dialect.reader(feed(used)), None)
        except (csv.Error, _LineIsBad) as error:
            first = used[0][1]
            waiting.extendleft(reversed(used[1:]))
            if isinstance(first, DataFault):
                yield used[:1], first
            else:
                spans = f", looked for up to line {used[-1][0]}" if used[1:] else ""
                said = str(error) or "a line in it cannot be read"
                yield (
                    used[:1],
                    DataFault(
                        f"broken row ({said}{spans}): {first[:60]!r}",
                        mend="Close every quotation mark.",
                        kind="bad-csv",
                    ),
                )
            continue
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield used, cells


def find_dialect(lines: Callable[[], Iterator[Line]], suffix: str) -> tuple[Dialect, list[str]]:
    """The dialect of a file and what is to be said of it. `lines` may be called once."""
    found = lines()
    first = next(((number, line) for number, line in found if isinstance(line, DataFault) or line.strip()), None)
    if first is None or isinstance(first[1], DataFault):
        return Dialect("\t" if suffix == ".tsv" else ","), []
    text = first[1]
    there = [mark for mark in _SEPARATORS if mark in text]
    # Excel writes semicolons where the comma is the decimal mark.
    separator = "\t" if suffix == ".tsv" and "\t" in text else there[0] if there else "\t" if suffix == ".tsv" else ","
    if separator != "\t":
        return Dialect(separator), []
    return _judge(_chain(first, found))


def _chain(first: Line, rest: Iterator[Line]) -> Iterator[Line]:
    yield first
    yield from rest


def _judge(lines: Iterator[Line]) -> tuple[Dialect, list[str]]:
    """Tab-separated files either quote as CSV does, doubling the marks inside (pandas), or know no quoting.

    Cells that cannot be read the one way speak for the other.
    """
    quoting, literal, wrapped, bare = 0, 0, 0, 0
    for used, cells in _records(lines, Dialect("\t")):
        raw = "".join(line for _, line in used if isinstance(line, str))
        if '"' not in raw:
            bare += 1
        elif isinstance(cells, DataFault) or not _WELL_QUOTED.fullmatch(raw):
            literal += 1
        elif any(mark in cell for cell in cells for mark in '"\t\n'):
            quoting += 1
        else:
            wrapped += 1
        if quoting + literal + wrapped >= _JUDGED:
            break
    if not quoting + literal + wrapped:
        return Dialect("\t"), []
    quoted = quoting > literal or (wrapped > 0 and not literal and not bare)
    if quoted:
        return Dialect("\t"), ["quotation marks around cells are taken off, as in CSV"]
    return Dialect("\t", quoted=False), [
        "quotation marks are taken as part of the texts, for not all of them are CSV's"
    ]
