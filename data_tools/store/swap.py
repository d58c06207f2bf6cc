"""Putting a finished folder in the place of an old one: either the old or the new is there, at every moment."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

OLD = "old"  # within the building folder: the store that is being replaced, where the two cannot be exchanged at once


def building_folder(target: Path) -> Path:
    """Where a store is built: beside its place, on the same disk."""
    return target.with_name(f"{target.name}.building")


def replaced_store(target: Path) -> Path:
    """Where the old store lies if the process died between the two renames of `_replace_in_two_steps`."""
    return building_folder(target) / OLD


def swap_in(new: Path, target: Path) -> None:
    """Put the folder `new` at `target`; what was there ends up inside the building folder.

    Raises:
        OSError: the folder cannot be renamed (on Windows: because a program has it open).
    """
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        _replace_in_two_steps(new, target)
    _sync_folder(target.parent)


def _replace_in_two_steps(new: Path, target: Path) -> None:
    # For file systems without an exchange. Between the renames `open_store` finds the old store through `replaced_store`.
    os.rename(target, replaced_store(target))
    os.rename(new, target)


def mend_interrupted_swap(target: Path) -> None:
    """Bring the old store back if a build died between the two renames."""
    if not target.exists() and replaced_store(target).exists():
        os.rename(replaced_store(target), target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step (Linux: renameat2, macOS: renamex_np); False where that does not exist."""
    names = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            return library.renameat2(here, names[0], here, names[1], ctypes.c_uint(exchange)) == 0
        if sys.platform == "darwin":
            return library.renamex_np(names[0], names[1], ctypes.c_uint(2)) == 0  # RENAME_SWAP
    except (OSError, AttributeError, TypeError):
        pass
    return False


def _sync_folder(folder: Path) -> None:
    """Bring the rename to the disk; Windows neither can nor has to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
