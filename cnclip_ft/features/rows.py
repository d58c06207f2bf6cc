"""Float rows on the disk, ``[count, width]`` or ``[views, count, width]``, filled block by block, by many at once.

::

    NAMEfeatures.npy                  of full size from the beginning; the room is taken first where the system can
    NAMEdone.npy                      uint8, 1 for every block whose rows have reached the disk
    NAMEdamaged-block-NUMBER.jsonl    [row, fault] a line, for items that have no features

Each process writes its share of the blocks that are missing, and whoever comes back after an interruption goes on with
the rest. What the rows belong to is said beside them by their owner: a key in the folder's name, or a plan.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import write_array
from data_tools.atomic import sync_folder, whole_file, whole_path
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock


@dataclass(frozen=True)
class Block:
    """Rows `start` … `stop` of one view; `number` counts on over all views."""

    number: int
    view: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Rows:
    """One array (module docstring); nothing is touched before `create`.

    Args:
        block: rows between two marks: what an interruption can cost.
        views: None for an array without that dimension.
        name: begins the names of the files, for arrays that share a folder.
        advice: what to do where the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        block: int,
        *,
        views: int | None = None,
        dtype: npt.DTypeLike = np.float32,
        name: str = "",
        advice: str = "Free some space and give the same command again.",
    ) -> None:
        self.folder, self.count, self.block, self.dtype = folder, count, block, np.dtype(dtype)
        self.name, self.advice = name, advice
        self.file, self._marks = folder / f"{name}features.npy", folder / f"{name}done.npy"
        self._lead = () if views is None else (views,)
        self._blocks = -(-count // block)  # of a view

    @property
    def begun(self) -> bool:
        return self._marks.is_file()

    def create(self, width: int) -> None:
        """Take the room on the disk, unless another process has.

        Raises:
            UserError: there is not enough, or nothing can be written there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(self.folder / "cnclip-ft.lock"):
            if not self.begun:
                _new_array(self.file, (*self._lead, self.count, width), self.dtype, self.advice)
                # Written last: its presence says that both arrays have their full size.
                _new_array(self._marks, (*self._lead, self._blocks), np.dtype(np.uint8), self.advice)

    def read(self, width: int | None = None) -> np.memmap:
        """The array, memory-mapped; rows of blocks that are missing are 0.

        Args:
            width: that it has to have; None where whoever asks looks at it.

        Raises:
            UserError: it is not what was created.
        """
        return self._open(self.file, self.dtype, self.count, width)

    def refuse_damage(self) -> None:
        """Reads the whole array: for when something that was made with it is no number.

        Raises:
            UserError: rows hold NaN or infinity. What is computed is looked at before it is written: the file is damaged.
        """
        array, damaged = self.read(), set[int]()
        for view in array.reshape(-1, *array.shape[-2:]):
            for start in range(0, self.count, self.block):
                sound = np.isfinite(view[start : start + self.block]).all(1)
                damaged.update((start + np.flatnonzero(~sound)).tolist())
        rows = sorted(damaged - self.faults().keys())
        if rows:
            named = ", ".join(map(str, rows[:5])) + ", …" * (len(rows) > 5)
            raise UserError(
                f"{self.file} is damaged: {len(rows):,} of {self.count:,} rows, counted from 0, hold NaN or infinity "
                f"({named}). {self._mend}"
            )

    def _open(self, file: Path, dtype: np.dtype, *shape: int | None) -> np.memmap:
        wanted = (*self._lead, *shape)
        try:
            array = np.load(file, mmap_mode="r")
            sizes = zip(wanted, array.shape, strict=False)
            if array.dtype != dtype or array.ndim != len(wanted) or any(w not in (None, size) for w, size in sizes):
                expected = ", ".join("any" if size is None else str(size) for size in wanted)
                raise ValueError(f"it holds {array.dtype} {list(array.shape)}, expected {dtype} [{expected}]")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{file} cannot be used ({getattr(error, 'strerror', None) or error}). {self._mend}"
            ) from None
        return array

    @property
    def _mend(self) -> str:
        return f"Remove {self.folder}: its features are computed again"

    def missing(self, share: int = 0, of: int = 1) -> list[Block]:
        """Blocks not yet written; of several processes, those this one is to write: by their numbers, so that each is one's and not
        another's whenever they look, also where other runs write."""
        numbers = np.flatnonzero(self._done() == 0)
        return [self._at(int(number)) for number in numbers[numbers % of == share]]

    def _done(self) -> np.memmap:
        return self._open(self._marks, np.dtype(np.uint8), self._blocks)

    def _at(self, number: int) -> Block:
        view, place = divmod(number, self._blocks)
        return Block(number, view, place * self.block, min((place + 1) * self.block, self.count))

    def has(self, block: Block) -> bool:
        """Whether it has been written by now, by whomever."""
        return bool(self._done().flat[block.number])

    def write(self, block: Block, rows: npt.NDArray[np.generic], faults: Mapping[int, Any] | None = None) -> None:
        """One block, and what is wrong with items of it: row → fault, as JSON. The rows of those mean nothing.

        Raises:
            UserError: the disk cannot take it, or what is there has rows of another width.
        """
        if len(rows) != len(block):
            raise ValueError(f"{len(rows)} rows for a block of {len(block)}")
        array = self.read(rows.shape[1])
        lines = [json.dumps([row, fault]) for row, fault in (faults or {}).items() if block.start <= row < block.stop]
        notes = self.folder / f"{self.name}damaged-block-{block.number:06d}.jsonl"
        if lines:
            with whole_file(notes, "w", advice=self.advice) as file:
                file.writelines(line + "\n" for line in lines)
        else:
            notes.unlink(missing_ok=True)  # of an attempt that ended before the mark
        # Not through the mapping: there a full disk would end the process, and pages that two machines share be lost.
        first = (block.view * self.count + block.start) * array.shape[-1] * self.dtype.itemsize
        self._write_at(self.file, array.offset + first, np.ascontiguousarray(rows, self.dtype).tobytes())
        self._write_at(self._marks, self._done().offset + block.number, b"\1")

    def _write_at(self, file: Path, place: int, data: bytes) -> None:
        try:
            with open(file, "rb+") as handle:
                handle.seek(place)
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror or error}). What was computed before is kept. {self.advice}"
            ) from None

    def fill(
        self,
        blocks: Sequence[Block],
        batches: Iterable[npt.NDArray[np.generic]],
        faults: Mapping[int, Any] | None = None,
    ) -> None:
        """Write each of the blocks when it is full; `batches` are of any size and give the rows of all of them, in order.

        Args:
            faults: as `write`; `batches` adds to it before it gives the item's row.
        """
        queue, held = list(reversed(blocks)), []
        for batch in batches:
            held.append(batch)
            while queue and sum(map(len, held)) >= len(queue[-1]):
                block, joined = queue.pop(), np.concatenate(held)
                self.write(block, joined[: len(block)], faults)
                held = [joined[len(block) :]]

    def finish(self, target: Path, without: Collection[int] = ()) -> None:
        """The array becomes the file `target`: by renaming, or by a copy where rows are left out.

        Raises:
            UserError: blocks are missing, or there is no room for a copy.
        """
        missing = sum(map(len, self.missing()))
        if missing:
            raise UserError(
                f"{self.folder} holds {self.count - missing:,} of {self.count:,} {self.name.rstrip('_')} features; "
                "give the same command again"
            )
        if without:
            array, kept = self.read(), np.delete(np.arange(self.count), list(without))
            with whole_file(target, advice=self.advice) as file:
                blocks = (array[kept[at : at + self.block]] for at in range(0, len(kept), self.block))
                write_array(file, blocks, (len(kept), array.shape[1]), self.dtype)
        elif self.file.exists():  # else an attempt that was stopped came this far
            os.replace(self.file, target)
            sync_folder(target.parent)

    def faults(self) -> dict[int, Any]:
        """Row → fault, of the blocks written. Version 0.1.0 kept the row alone."""
        files = self.folder.glob(f"{self.name}damaged-*.jsonl")
        entries = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return dict(sorted(((e, None) if isinstance(e, int) else e for e in entries), key=lambda entry: entry[0]))


def _new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, advice: str) -> None:
    size = f"Features of {math.prod(shape) * dtype.itemsize:,} bytes are to be kept there. {advice}"
    with whole_path(path, advice=size) as beside:
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape)
        array.flush()
        del array
        if hasattr(os, "posix_fallocate"):  # a full disk is said here, before anything is computed
            with open(beside, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Waits for the processes that hold `file`; what is done inside takes moments."""
    while True:
        try:
            lock = FileLock(file, "preparing these features")
            break
        except RequestError:
            time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()
