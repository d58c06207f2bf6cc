"""Blocks of arrays on the disk, made by all processes in shares: what is done is not done again, what is damaged is made anew."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from cnclip_ft.collectives import in_rounds, meet, rank, world_size
from data_tools.atomic import whole_file
from data_tools.bars import Bar

Block = dict[str, np.ndarray]


class Blocks:
    """Files ``block-NUMBER.npz`` in a folder.

    Args:
        make: the arrays of a block; called on the process whose share it is in, and where a block is damaged.
        advice: what to do where nothing can be written, for the error.
        what: what they are of, for the progress bar.
    """

    def __init__(self, folder: Path, count: int, make: Callable[[int], Block], *, advice: str, what: str) -> None:
        self.folder, self.count, self.make = folder, count, make
        self.advice, self.what = advice, what

    def path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.npz"

    def fill(self, device: torch.device, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Make what is missing; all processes call it, within `collectives.together`. `around` is entered for every block."""
        missing = [number for number in range(self.count) if not self.path(number).is_file()]
        meet(device)  # all have looked before one writes
        own = missing[rank() :: world_size()]
        rounds = in_rounds(own, device, lambda: False)
        for number in Bar(rounds, desc=self.what, unit="block", total=len(own), delay=2.0):
            with around():
                self._write(number)

    def read(self, number: int) -> Block:
        try:
            return self._held(number)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError):  # damaged on the disk
            self._write(number)
            return self._held(number)

    def _write(self, number: int) -> None:
        with whole_file(self.path(number), advice=self.advice) as file:
            np.savez(file, **self.make(number))  # type: ignore[arg-type] # names of arrays, not of options

    def _held(self, number: int) -> Block:
        with np.load(self.path(number), allow_pickle=False) as held:
            return dict(held)
