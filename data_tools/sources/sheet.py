"""The rows of an Excel file (.xlsx), every cell as text; read row by row."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from data_tools.errors import RequestError
from data_tools.terminal import plain


class Sheet:
    """The first sheet with one of the columns `wanted` in its first row, else the first that is not empty; visible ones go first.

    Args:
        file: a workbook. wanted: whether a cell names a column that is looked for.

    Raises:
        RequestError: openpyxl is missing, or it is no workbook.
    """

    def __init__(self, file: Path, wanted: Callable[[str], bool]) -> None:
        self.file, self.notes = file, list[str]()
        book = self._told(_open, file)
        filled = [sheet for sheet in book.worksheets if self._told(_has_cells, sheet)]
        filled.sort(key=lambda sheet: sheet.sheet_state != "visible")
        named = (sheet for sheet in filled if any(map(wanted, self._told(_first_row, sheet))))
        self._sheet = next(named, (filled or book.worksheets)[0])
        others = [sheet for sheet in filled if sheet is not self._sheet]
        if others:
            shown = ", ".join(repr(plain(sheet.title, lines=False)) for sheet in others[:3])
            self.notes.append(
                f"{file.name}: sheet {plain(self._sheet.title, lines=False)!r} is read, {len(others)} others are not ({shown})"
            )
        self.total: int | None = self._sheet.max_row

    def _told(self, work: Any, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except ImportError:
            raise RequestError("Excel files need openpyxl: pip install 'cnclip-ft[excel]'; or save it as CSV") from None
        except (BadZipFile, KeyError, ValueError, TypeError, OSError, SyntaxError, EOFError) as error:
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise RequestError(
                f"{self.file} is not a readable .xlsx ({said}); open it and save it again, or as CSV"
            ) from None

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(row number, cells) of every row that is not blank."""
        self._told(self._sheet.reset_dimensions)  # some writers state too few
        rows = iter(self._sheet.iter_rows(values_only=True))
        number = 0
        while (row := self._told(next, rows, None)) is not None:
            number += 1
            cells = [_as_text(cell) for cell in row]
            if any(cells):
                while not cells[-1]:
                    cells.pop()
                yield number, cells


def _open(file: Path) -> Any:
    import openpyxl

    return openpyxl.load_workbook(file, read_only=True, data_only=True)


def _has_cells(sheet: Any) -> bool:
    sheet.reset_dimensions()
    return any(cell is not None for row in sheet.iter_rows(values_only=True, max_row=100) for cell in row)


def _first_row(sheet: Any) -> list[str]:
    """Cells of the first row that is not blank."""
    rows = (list(map(_as_text, row)) for row in sheet.iter_rows(values_only=True, max_row=100))
    return next((row for row in rows if any(row)), [])


def _as_text(cell: Any) -> str:
    """As Excel shows it with no format of its own: 99.0 is ``99``, a day without hours ``2024-05-01``."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return str(cell)
