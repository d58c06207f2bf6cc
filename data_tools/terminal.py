"""What a terminal is shown: no name of a file and no caption can steer it."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# C0 without tab and line feed, DEL, C1; marks that turn the direction of writing; what no encoding can carry.
_STEERING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_ACROSS_LINES, _WITHIN_A_LINE = re.compile(f"[{_STEERING}]"), re.compile(f"[{_STEERING}\t\n]")
_CURSOR = re.compile(r"(?:\r|\n|\x1b\[A)*")  # what tqdm sends by itself


def plain(text: str, *, lines: bool = True) -> str:
    r"""`text` with control codes, marks of direction and lone surrogates as ``\u001b``.

    These escapes are JSON's own: a line of JSON stays the same value.

    Args:
        lines: leave tabs and line feeds alone. False: for a name, which could forge a line of its own.
    """
    return (_ACROSS_LINES if lines else _WITHIN_A_LINE).sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class PlainStream:
    """A text stream whose text passes through `plain`; everything else is the stream's own.

    Args:
        bars: progress bars are drawn here: a carriage return may begin what is written.
    """

    def __init__(self, stream: TextIO, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        if self._bars and _CURSOR.fullmatch(text):
            self._stream.write(text)
        elif self._bars and text.startswith("\r"):
            self._stream.write("\r" + plain(text[1:]))
        else:
            self._stream.write(plain(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def use_plain_streams() -> None:
    """From here on everything this process prints is UTF-8 and steers nothing: messages, tables, bars, libraries' warnings."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, PlainStream):
            continue
        if hasattr(stream, "reconfigure"):  # Windows consoles and LANG=C default to an encoding without Chinese
            stream.reconfigure(encoding="utf-8", errors="replace")
        setattr(sys, name, PlainStream(stream, bars=name == "stderr"))
