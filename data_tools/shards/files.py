"""Pictures out of shards by their place: open files are few, whatever the number of shards."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import DataFault, UserError
from data_tools.shards.part import Stamp
from data_tools.shards.places import TAR, kind_of
from data_tools.sources.rows import open_parquet, parquet_errors

OPEN_FILES = 256  # of a process
GROUP_BYTES = 256 * 2**20  # of decoded row groups a process keeps; one is kept whatever it takes


class Opened(Protocol):
    """One shard, open."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The picture at `offset`: a byte of a tar, a row of a Parquet file.

        Raises:
            OSError: it cannot be read to its end.
        """
        ...


class _Tar(Opened):
    def __init__(self, file: Path) -> None:
        self._handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self.size = 0  # nothing is kept

    def read(self, offset: int, length: int) -> bytes:
        data = self._some(offset, length)
        while len(data) < length and (more := self._some(offset + len(data), length - len(data))):
            data += more
        if len(data) < length:
            raise OSError(f"{len(data):,} of {length:,} bytes are there")
        return data

    def _some(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._handle, length, offset)
        with self._lock:
            os.lseek(self._handle, offset, os.SEEK_SET)
            return os.read(self._handle, length)

    def __del__(self) -> None:
        """Let go of by the last thread that reads it: none closes it under another."""
        if hasattr(self, "_handle"):
            os.close(self._handle)


class _Parquet(Opened):
    """Row groups are decoded as a whole, and the last one is kept: its other pictures cost nothing then."""

    def __init__(self, file: Path, image: str) -> None:
        self._file, self._image = open_parquet(file), image
        metadata = self._file.metadata
        self._ends, end = list[int](), 0
        for group in range(metadata.num_row_groups):
            end += metadata.row_group(group).num_rows
            self._ends.append(end)
        self._group, self._values, self.size = -1, None, 0
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        from bisect import bisect_right

        with self._lock:
            group = bisect_right(self._ends, offset)
            if group >= len(self._ends):
                raise OSError(f"row {offset + 1:,} is not there")
            if group != self._group:
                self._values = None  # two are never held at once
                try:
                    column = self._file.read_row_group(group, columns=[self._image], use_threads=False).column(0)
                except parquet_errors() as error:
                    raise OSError(f"row group {group} cannot be read ({str(error)[:200]})") from None
                self._group, self._values, self.size = group, column, column.nbytes
            values: Any = self._values
            cell = values[offset - (self._ends[group - 1] if group else 0)].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or len(data) != length:
            raise OSError(f"row {offset + 1:,} does not hold the {length:,} bytes it held")
        return data


def open_shard(file: Path, image: str | None) -> Opened:
    """Open a shard; `image`: the column of pictures of a Parquet file."""
    return _Tar(file) if kind_of(file) == TAR else _Parquet(file, image or "image")


class ShardFiles:
    """The shards of an index by number, opened when a picture of theirs is asked for, in one process and its threads.

    A shard that is another one than its stamp says is refused when it is opened: never is a picture of other bytes handed out.
    """

    def __init__(self, files: Sequence[Path], stamps: Sequence[Stamp], images: Sequence[str | None]) -> None:
        self._files, self._stamps, self._images = files, stamps, images
        self._groups = any(images)
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """The bytes of a picture.

        Raises:
            UserError: the shard was replaced since its index was made.
            DataFault: the picture cannot be read.
        """
        file = self._files[shard]
        try:
            return self._opened(shard).read(offset, length)
        except OSError as error:
            raise DataFault(
                f"the picture cannot be read ({error.strerror or error})",
                mend="Bring the shard back as it was.",
                kind="damaged-shard",
                file=file,
            ) from None
        finally:
            self._spare(shard)

    def _opened(self, shard: int) -> Opened:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        problem = self._stamps[shard].problem(self._files[shard])
        if problem is not None:
            raise UserError(
                f"{self._files[shard]} is not the shard whose index is read: {problem}. Start again with the shards that are there "
                "now, and change none while they are used."
            )
        opened = open_shard(self._files[shard], self._images[shard])
        with self._lock:
            return self._open.setdefault(shard, opened)

    def _spare(self, last: int) -> None:
        """Close what was asked for longest ago; the one asked for last stays."""
        with self._lock:
            while len(self._open) > OPEN_FILES or (self._groups and len(self._open) > 1 and self._kept() > GROUP_BYTES):
                number = next(iter(self._open))
                if number == last:
                    break
                del self._open[number]

    def _kept(self) -> int:
        return sum(opened.size for opened in self._open.values())

    def close(self) -> None:
        with self._lock:
            self._open.clear()
