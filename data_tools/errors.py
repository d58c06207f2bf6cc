"""Errors meant for the person who must mend them.

The command prints their message and exits with `exit_code`: 2 when the request
itself was wrong (a flag, a recipe key, a path that is not there), 1 when the
request was fine and the work failed (broken data, a full disk).
"""

from __future__ import annotations

from pathlib import Path

from data_tools.terminal import plain


def printable(text: str) -> str:
    """`text` with bytes of file names that are no UTF-8 written ``\\udcb0``: printing them would fail."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class UserError(Exception):
    """The work failed for a reason the user can mend; the message says how."""

    exit_code = 1


class RequestError(UserError):
    """The request was wrong: nothing has been started."""

    exit_code = 2


class DataFault(UserError):
    """One fault in the data: where it stands, what was found, what to do.

    `kind` is a short stable word (``bad-json``, ``missing-image``, …) by which
    faults are counted; `line` counts from 1; `item_id` is the image or text id.
    """

    def __init__(
        self,
        problem: str,
        *,
        mend: str,
        kind: str = "bad-data",
        file: str | Path | None = None,
        line: int | None = None,
        item_id: int | str | None = None,
    ) -> None:
        self.problem, self.mend, self.kind = printable(problem), printable(mend), kind
        self.file, self.line = None if file is None else printable(str(file)), line
        self.item_id = printable(item_id) if isinstance(item_id, str) else item_id
        name = "" if self.file is None else plain(self.file, lines=False)
        where = "" if file is None else f"{name}:{line}: " if line is not None else f"{name}: "
        super().__init__(f"{where}{self.problem}. {self.mend}")

    def as_dict(self) -> dict[str, object]:
        """The fault as one line of ``faults.jsonl``."""
        return {
            "kind": self.kind,
            "file": self.file,
            "line": self.line,
            "id": self.item_id,
            "problem": self.problem,
            "mend": self.mend,
        }
