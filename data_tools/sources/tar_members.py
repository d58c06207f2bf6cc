"""Members of a tar, one by one: a damaged one is a fault, and reading goes on at the next header.

Nothing is taken at its word: sizes are compared with limits before they are read, and what a gzip makes of few bytes
is read in pieces.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import DataFault
from data_tools.regular import regular

LARGEST_MEMBER = 2**30  # bytes
_LARGEST_HEADER = 2**20  # bytes of a long name or of pax fields
_PIECE = 2**20
_BLOCK = tarfile.BLOCKSIZE
# Of a header: mode, owner, group, size, time, sum and the type of a file; device numbers, and that no more of a name follows.
_NUMBERS, _NUMBERS_AT = re.compile(rb"(?:[0-7]{7}\0){3}([0-7]{11})\0[0-7]{11}\0([0-7]{6})\0 0"), 100
_DEVICES, _DEVICES_AT = re.compile(rb"(?:[0-7]{7}\0|\0{8}){2}\0"), 329
_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    IndexError,
    KeyError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(slots=True)
class Member:
    """A file of the tar: its name as bytes read as UTF-8 (others as half characters) and its content or what is wrong.

    `place` is the byte of the unpacked tar at which the content begins.
    """

    name: str
    content: bytes | DataFault
    place: int = -1


class TarMembers:
    """The members of `file` in order; `tell` counts bytes of the file read; `passed` other things than files.

    Raises:
        RequestError: no such file, or no regular one.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.size, self.passed = file, regular(file), 0
        self._raw: BinaryIO | None = None

    def tell(self) -> int:
        return self.size if self._raw is None or self._raw.closed else self._raw.tell()

    def __iter__(self) -> Iterator[Member | DataFault]:
        with self.file.open("rb", buffering=_PIECE) as self._raw:
            try:
                content = _uncompressed(self._raw)
                yield from self._members(_Sparing(content))
            except _ERRORS as error:
                yield _fault(error)

    def _members(self, content: _Sparing) -> Iterator[Member | DataFault]:
        expected = start = 0
        while True:  # the constructor reads the first header
            try:
                content.seek(start)
                # On behind damage, and into a second archive written behind the first.
                archive = tarfile.TarFile(
                    fileobj=content,
                    mode="r",
                    tarinfo=_Header,
                    ignore_zeros=True,
                    encoding="utf-8",
                    errors="surrogateescape",
                )
                break
            except _ERRORS as error:
                yield _fault(error)
                expected = start = start + _BLOCK
                if not content.reaches(start):
                    return
        entry: tarfile.TarInfo | None = None  # what the constructor read, `next` gives
        while True:
            if entry is not None:
                start = entry.offset
                if content.holds_data(expected, start):
                    yield _fault(f"{start - expected:,} bytes before {entry.name[:60]!r} are no members")
                yield from self._member(archive, entry)
                expected = archive.offset
            archive.members.clear()  # type: ignore[attr-defined] # else every member stays in memory; not declared
            try:
                entry = archive.next()
            except _ERRORS as error:
                entry = None
                if not content.reaches(archive.offset):
                    if "unexpected end" not in str(error) or expected != archive.offset:
                        yield _fault(error)
                    return
                yield _fault(error)
                archive.offset += _BLOCK
                content.seek(archive.offset)
                expected = archive.offset
                continue
            if entry is None:
                if content.holds_data(expected, None):
                    yield _fault("what stands behind the last member is none")
                return

    def _member(self, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[Member]:
        if entry.isdir():
            return
        if entry.issparse():
            yield Member(entry.name, _bad(f"{entry.name!r} is a sparse file", "Write the tar without --sparse."))
        elif not entry.isreg():
            yield Member(entry.name, _bad(f"{entry.name!r} is a link or a device", "Write the tar with --dereference."))
        elif entry.size > LARGEST_MEMBER:
            yield Member(
                entry.name,
                _bad(
                    f"{entry.name!r} claims {entry.size:,} bytes; a member has at most {LARGEST_MEMBER:,}", "Shrink it."
                ),
            )
        else:
            try:
                yield Member(entry.name, _read(archive, entry), entry.offset_data)
            except _ERRORS as error:
                yield Member(
                    entry.name, _bad(f"{entry.name!r} cannot be read ({_said(error)})", "Write the tar again.")
                )


class _Header(tarfile.TarInfo):
    """tarfile's, of an ordinary file in a third of its time, which is most of what reading a tar of small pictures takes.

    What it leaves alone (owner, times) nobody asks for here; any other header is tarfile's.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        numbers = _NUMBERS.match(buf, _NUMBERS_AT)
        if numbers is None or len(buf) != _BLOCK or _DEVICES.match(buf, _DEVICES_AT) is None:
            return super().frombuf(buf, encoding, errors)
        size, told = (int(number, 8) for number in numbers.groups())
        if sum(buf) - sum(buf[148:156]) + 8 * ord(" ") != told:  # the sum itself counts as blanks
            return super().frombuf(buf, encoding, errors)
        header = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        header.size, header.chksum = size, told
        return header


class _Sparing:
    """A stream of bytes that reads no header at the size it claims."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._content.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._content.seek(place, whence)

    def tell(self) -> int:
        return self._content.tell()

    def write(self, data: bytes) -> int:
        raise OSError("read only")

    def close(self) -> None:
        """Its owner closes the file."""

    def reaches(self, place: int) -> bool:
        """Whether there are bytes at `place`."""
        self._content.seek(place)
        return bool(self._content.read(1))

    def holds_data(self, start: int, end: int | None) -> bool:
        """Whether anything but zeros stands there."""
        if end is not None and end <= start:
            return False
        here = self._content.tell()
        self._content.seek(start)
        found, left = False, end - start if end is not None else None
        while (
            not found
            and (left is None or left > 0)
            and (piece := self._content.read(_PIECE if left is None else min(left, _PIECE)))
        ):
            found = bool(piece.strip(b"\0"))
            left = None if left is None else left - len(piece)
        self._content.seek(here)
        return found


def _read(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    handle: Any = archive.fileobj
    handle.seek(entry.offset_data)
    pieces, left = list[bytes](), entry.size
    while left > 0:
        piece = handle.read(min(left, _LARGEST_HEADER))
        if not piece:
            raise tarfile.ReadError("unexpected end of data")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _uncompressed(raw: BinaryIO) -> Any:
    import bz2
    import gzip

    first = raw.read(6)
    raw.seek(0)
    for mark, opener in (
        (b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
        (b"BZh", bz2.BZ2File),
        (b"\xfd7zXZ\0", lzma.LZMAFile),
    ):
        if first.startswith(mark):
            return opener(raw)
    return raw


def _said(error: object) -> str:
    return (str(error) or type(error).__name__)[:200]


def _fault(error: object) -> DataFault:
    return DataFault(f"the tar is damaged ({_said(error)})", mend="Fetch or write it again.", kind="bad-tar")


def _bad(problem: str, mend: str) -> DataFault:
    return DataFault(problem, mend=mend, kind="bad-member")
