"""Tables and lines that fit the terminal they are printed on; into a file or a pipe they go at full width."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TextIO

from data_tools.terminal import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_FOLDED = 16  # a column of text is not made narrower than this
_GAP = 2
_COMMAND = re.compile(r"(?:^|(?<=: ))\s*(cnclip-ft|pip install) \S.*$")
_HANGING = re.compile(
    r"\s*(?:\* |[^\s:]+(?: [^\s:]+)*(?:\s{2,}|: ))?"
)  # what stands before a line's text: indent, label


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that `stream` (standard output) is, or COLUMNS where that is set; None for a file or a pipe."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    stream = sys.stdout if stream is None else stream
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: Collection[int] = (0,), width: int | None = None
) -> str:
    """Aligned columns under their heads; Chinese characters count as two columns.

    Where `width` is too narrow, heads and columns of text are folded; numbers never are: those that find no room stand
    in another block below, with the first column again.

    Args:
        text: columns of text, to the left; the others hold numbers, to the right.
        width: columns of the terminal; None: as wide as it needs (`terminal_width` gives it).
    """
    from rich.cells import cell_len

    rows = [[plain(cell, lines=False) for cell in row] for row in rows]  # a name could forge a line of its own
    columns = [[head, *(row[i] for row in rows)] for i, head in enumerate(heads)]
    most = [max(map(cell_len, cells)) for cells in columns]
    least = [
        min(most[i], max(_FOLDED, _longest_word(heads[i])))
        if i in text
        else max(_longest_word(heads[i]), *map(cell_len, ["", *cells[1:]]))
        for i, cells in enumerate(columns)
    ]
    blocks: list[list[int]] = [[0]]
    for i in range(1, len(heads)):
        if width is not None and len(blocks[-1]) > 1 and _total([least[j] for j in (*blocks[-1], i)]) > width:
            blocks.append([0])
        blocks[-1].append(i)
    return "\n\n".join(_block(heads, rows, block, least, most, text, width) for block in blocks)


def _longest_word(head: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, head.split()), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _block(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    block: list[int],
    least: list[int],
    most: list[int],
    text: Collection[int],
    width: int | None,
) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = {i: most[i] for i in block}
    while width is not None and _total(list(widths.values())) > width:
        widest = max((i for i in block if widths[i] > least[i]), key=lambda i: widths[i], default=None)
        if widest is None:  # narrower than one number beside a folded name: the terminal breaks the line
            break
        widths[widest] -= 1
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="")
    for i in block:
        shown.add_column(
            Text(heads[i]),
            width=widths[i],
            justify="left" if i in text else "right",
            overflow="fold",
            vertical="top" if len(text) == len(heads) else "bottom",
        )
    for row in rows:
        shown.add_row(*(_cell(row[i]) for i in block))
    console = Console(width=_total(list(widths.values())), color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def _cell(text: str) -> RenderableType:
    """What is folded stays behind the cell's own indent."""
    from rich.padding import Padding
    from rich.text import Text

    words = text.lstrip(" ")
    return Padding(Text(words), (0, 0, 0, len(text) - len(words))) if words != text else Text(text)


def fitted(text: str, width: int | None) -> str:
    """Lines no longer than `width`, broken at spaces, what follows below the first word behind indent and label.

    A command at a line's end goes below it, and is not broken.
    """
    if width is None:
        return text
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def say(text: str = "") -> None:
    """Print lines that fit the terminal, on standard output."""
    print(fitted(text, terminal_width()), flush=True)


def note(text: str) -> None:
    """Print lines that fit the terminal, on standard error."""
    print(fitted(text, terminal_width(sys.stderr)), file=sys.stderr, flush=True)


def _wrapped(line: str, width: int) -> str:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    if cell_len(line) <= width:
        return line
    to_type = _COMMAND.search(line)
    if to_type:  # a line to type stays whole: it is copied
        before = line[: to_type.start()].rstrip()
        return (_wrapped(before, width) + "\n" if before else "") + f"  {to_type[0].strip()}"
    start = _HANGING.match(line)
    head = start[0] if start else ""
    if cell_len(head) > width // 2:
        head = line[: len(line) - len(line.lstrip())]
    console = Console(width=width, color_system=None)
    parts = Text(line[len(head) :]).wrap(console, width - cell_len(head), overflow="fold")
    return "\n".join(
        (head if not number else " " * cell_len(head)) + part.plain.rstrip() for number, part in enumerate(parts)
    )
