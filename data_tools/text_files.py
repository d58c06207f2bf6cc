"""Text files line by line, whatever wrote them: every line is text or a fault of its own.

Lines end with LF, CRLF or, in files that have no LF, CR; nothing else ends a line (not U+2028, U+0085 or a vertical tab).
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data_tools.errors import DataFault, RequestError
from data_tools.regular import regular

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AUTO = "auto"  # an encoding: found out from the bytes
LONGEST_LINE = 256 * 2**20  # bytes; a picture of 190 MiB
_BUFFER = 2**20
_LOOKED_AT = 2**16  # bytes at the beginning that tell how lines end
_SHOWN = 60
_JUDGED = 100_000  # lines beyond ASCII that speak for an encoding or against it
_NAMES = {"utf-8": "UTF-8", "gb18030": "GB18030 (GBK)"}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


_GB_PAIR = re.compile(rb"([\x81-\xfe])[\x40-\x7e\x80-\xfe]")


# Broken units become half characters, which no UTF-8 holds: the line they stand on is a fault, the others are not.
def _half(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udc80", error.end


codecs.register_error("half", _half)


class TextFile:
    """A text file opened for one sweep; `tell` counts bytes read.

    Args:
        encoding: of the lines (None: UTF-8, and no flag says otherwise; `AUTO`: `find_encoding`); a byte order mark at the
            beginning knows better.

    Attributes:
        found: the encoding of the file, by Python's name. read_as: the same for people, and whether a mark said it.

    Raises:
        RequestError: no such file, no regular one, an unknown encoding, or UTF-16 where another one was named.
    """

    def __init__(self, file: Path, encoding: str | None = "utf-8") -> None:
        self.file, self.size = file, regular(file)
        self._by_itself = encoding == AUTO
        name = None if encoding is None or self._by_itself else known_encoding(encoding)
        try:
            self._bytes: BinaryIO = file.open("rb", buffering=_BUFFER)
        except OSError as error:
            raise RequestError(f"{file} cannot be read ({error.strerror})") from None
        if self._by_itself:
            name = find_encoding(self._bytes)
            self._bytes.seek(0)
        first = self._bytes.read(_LOOKED_AT)
        self._bytes.seek(0)
        name = next((name for mark, name in _MARKS.items() if first.startswith(mark)), name)
        self._handle, self.encoding, self.found = self._bytes, name, name or "utf-8"
        self.read_as = _for_people(self.found, first)
        if name is not None and not _ends_lines_as_ascii(name):
            self._handle, self.encoding = io.BufferedReader(_Pieces(_in_utf8(self._bytes, name)), _BUFFER), "utf-8"
            first = self._handle.peek(_LOOKED_AT)[:_LOOKED_AT]
        elif first.count(b"\0") * 4 >= len(first) > 0:
            self._bytes.close()
            found, other = _reads_as(first, self.encoding or "utf-8", 0)
            mend = (
                f"save it as UTF-8: iconv -f {other} -t utf-8 FILE > NEW"
                if encoding is None
                else f"add --encoding {other}"
            )
            raise RequestError(f"{file} is no text of one byte a letter ({found}); {mend}")
        if b"\r" in first[:-1] and b"\n" not in first:
            self._handle = io.BufferedReader(_Pieces(_with_line_feeds(self._handle)), _BUFFER)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._bytes.close()

    def tell(self) -> int:
        return self.size if self._bytes.closed else self._bytes.tell()

    def raw(self) -> Iterator[tuple[int, str | DataFault]]:
        """(line number, line with its end) of every line."""
        return self._decoded(raw_lines(self._handle))

    def lines(self) -> Iterator[tuple[int, str | DataFault]]:
        """(line number, line without its end) of every non-blank line."""
        return self._decoded(read_lines(self._handle))

    def _decoded(self, lines: Iterator[tuple[int, bytes | DataFault]]) -> Iterator[tuple[int, str | DataFault]]:
        for number, line in lines:
            try:
                if isinstance(line, bytes):
                    yield number, decode_line(line, self.encoding, self._by_itself)
                else:
                    yield number, line
            except DataFault as fault:
                yield number, fault


def raw_lines(handle: BinaryIO, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes | DataFault]]:
    """(line number, line with its end) of every line; a byte order mark is skipped."""
    number = 0
    while line := handle.readline(longest):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) >= longest and not line.endswith(b"\n"):
            while (rest := handle.readline(longest)) and not rest.endswith(b"\n"):
                pass
            yield (
                number,
                DataFault(
                    f"the line is longer than {longest >> 20} MiB",
                    kind="line-too-long",
                    mend="Is it the right file? Lines end with a newline.",
                ),
            )
        else:
            yield number, line


def read_lines(handle: BinaryIO, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes | DataFault]]:
    """(line number, line without its end) of every non-blank line."""
    for number, line in raw_lines(handle, longest):
        if isinstance(line, DataFault):
            yield number, line
        elif (line := line.rstrip(b"\r\n")) and not line.isspace():
            yield number, line


def find_encoding(handle: BinaryIO) -> str:
    """The encoding of a text from where `handle` stands: by its byte order mark, else UTF-16 by its zeros, else UTF-8 where
    every byte fits, else of UTF-8 and GB18030 the one that more lines fit; GB18030 only where it reads as common characters.

    All of the file is read (a gigabyte a second where it is UTF-8).
    """
    begin = handle.tell()
    first = handle.read(_LOOKED_AT)
    marked = next((name for mark, name in _MARKS.items() if first.startswith(mark)), None)
    if marked is not None:
        return marked
    if first.count(b"\0") * 4 >= len(first) > 0:
        return str(_reads_as(first, "utf-8", 0)[1])
    handle.seek(begin)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := handle.read(_BUFFER):
            decoder.decode(data)
        decoder.decode(b"", final=True)
        return "utf-8"
    except UnicodeDecodeError:
        handle.seek(begin)
    return _likelier(handle)


def _likelier(handle: BinaryIO) -> str:
    wrong, common, rare, judged = {"utf-8": 0, "gb18030": 0}, 0, 0, 0
    for line in iter(lambda: handle.readline(LONGEST_LINE), b""):
        if line.isascii():
            continue
        for name in wrong:
            try:
                line.decode(name)
            except UnicodeDecodeError:
                wrong[name] += 1
        leads = _GB_PAIR.findall(line)
        # Rows of punctuation and of the 3,755 common characters; words of Western alphabets fall on others.
        common += (usual := sum(0xA1 <= lead[0] <= 0xA3 or 0xB0 <= lead[0] <= 0xD7 for lead in leads))
        rare += len(leads) - usual
        judged += 1
        if judged >= _JUDGED:
            break
    return "gb18030" if wrong["gb18030"] < wrong["utf-8"] and common >= rare else "utf-8"


def name_of(encoding: str) -> str:
    """For people: ``utf-8`` → ``UTF-8``."""
    return _NAMES.get(encoding, encoding.upper())


def _for_people(encoding: str, begins: bytes) -> str:
    return name_of(encoding) + (" with a byte order mark" if begins.startswith(codecs.BOM_UTF8) else "")


def decode_text(data: bytes, encoding: str) -> tuple[str, str]:
    """A small text as a whole, without its byte order mark, and its encoding for people; `AUTO` finds it.

    Raises:
        DataFault: other bytes.
    """
    found = find_encoding(io.BytesIO(data)) if encoding == AUTO else encoding
    return decode_line(data, found, encoding == AUTO).removeprefix("\ufeff"), _for_people(found, data)


def decode_line(line: bytes, encoding: str | None = None, by_itself: bool = False) -> str:
    """The text of a line.

    Args:
        encoding: None for files that are UTF-8 by definition. by_itself: it was found out, not given.

    Raises:
        DataFault: other bytes; says as what they read, and the flag for it where there is one.
    """
    try:
        return line.decode(encoding or "utf-8")
    except (UnicodeError, ValueError) as error:
        asked = encoding or "utf-8"
        found, other = _reads_as(line, asked, getattr(error, "start", 0))
    if by_itself:
        mend = f"Mend the line (the others read as {name_of(asked)}), or name another encoding with --encoding."
    elif other is None:
        mend = "Save the file again as UTF-8." if encoding is None else "Name its encoding with --encoding."
    elif encoding is None:
        mend = f"Save the file as UTF-8: iconv -f {other} -t utf-8 FILE > NEW."
    else:
        mend = "Leave out --encoding." if other == "utf-8" else f"Add --encoding {other}."
    raise DataFault(f"the line is not {'UTF-8' if asked == 'utf-8' else asked} ({found})", mend=mend, kind="not-utf8")


def _reads_as(line: bytes, asked: str, start: int) -> tuple[str, str | None]:
    nulls = line.count(b"\0")
    if nulls:
        even = line[::2].count(b"\0") * 2 > nulls
        return "it looks like UTF-16", "utf-16" if line[:2] in _MARKS else "utf-16-be" if even else "utf-16-le"
    for other, name in (("utf-8", "UTF-8"), ("gb18030", "GBK")):
        if other != asked:
            try:
                return f"it reads as {name}: {line.decode(other).rstrip()[:_SHOWN]!r}", other
            except UnicodeDecodeError:
                pass
    return f"byte {start + 1} is 0x{line[start : start + 1].hex()}", None


def known_encoding(encoding: str) -> str:
    """Python's name of it.

    Raises:
        RequestError: there is no such encoding of text.
    """
    try:
        if "图,text\n".encode(encoding, "ignore").decode(encoding).endswith("text\n"):
            name = codecs.lookup(encoding).name
            return "utf-8" if name == "utf-8-sig" else name
    except (LookupError, UnicodeError, ValueError):
        pass
    raise RequestError(f"--encoding {encoding!r} is not known; try utf-8, gb18030 or utf-16")


def _ends_lines_as_ascii(encoding: str) -> bool:
    return "\t,\n".encode(encoding) == b"\t,\n"


def _in_utf8(handle: BinaryIO, encoding: str) -> Iterator[bytes]:
    """A file in UTF-16 or the like, as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)("half")
    data = b"-"
    while data:
        data = handle.read(_BUFFER)
        yield decoder.decode(data, final=not data).encode("utf-8", "surrogatepass")


def _with_line_feeds(handle: BinaryIO) -> Iterator[bytes]:
    """A file whose lines end with CR."""
    while data := handle.read(_BUFFER):
        yield data.replace(b"\r", b"\n")


class _Pieces(io.RawIOBase):
    """Pieces of bytes, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        while not self._rest and (piece := next(self._pieces, None)) is not None:
            self._rest = piece
        taken, self._rest = self._rest[: len(view)], self._rest[len(view) :]
        view[: len(taken)] = taken
        return len(taken)
