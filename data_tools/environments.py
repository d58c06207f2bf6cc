"""LMDB environments: reading ones shared inside a process and never across a fork, writing ones that grow."""

from __future__ import annotations

import os
from pathlib import Path

import lmdb

from data_tools.errors import RequestError, UserError

_open: dict[tuple[int, int], tuple[int, lmdb.Environment]] = {}  # (device, inode) → (process, environment)
_FIRST_MAP = 16 * 2**20
_BATCH_BYTES, _BATCH_ITEMS = 16 * 2**20, 4096


def _identity(folder: Path) -> tuple[int, int]:
    status = (folder / "data.mdb").stat()
    return status.st_dev, status.st_ino


def open_readonly(folder: Path) -> lmdb.Environment:
    """The environment of this process for `folder`.

    LMDB allows one per process and file, and none that came through a fork: the inherited one is closed first. A
    folder that was replaced holds another file and is opened anew.
    """
    key = _identity(folder)
    process, environment = _open.get(key, (None, None))
    if process == os.getpid():
        return environment
    if environment is not None:
        environment.close()
    try:
        # No lock file: a store never changes once it is there, and may lie on a read-only disk.
        environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_spare_txns=4)
    except lmdb.Error as error:
        raise RequestError(f"{folder / 'data.mdb'} is not a readable LMDB file ({error}). Build the store again.") from None
    _open[key] = (os.getpid(), environment)
    return environment


def close_readonly(folder: Path) -> None:
    """Close this process's environment for `folder`: Windows renames no open file."""
    process, environment = _open.pop(_identity(folder), (None, None))
    if process == os.getpid():
        environment.close()


class GrowingWriter:
    """Writes key-value pairs in batches; the map doubles when it is full, so no size has to be known or reserved.

    Raises:
        UserError: the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Synchronised once, in `close`: until then the folder is not in its place anyway.
        self.environment = lmdb.open(str(folder), map_size=_FIRST_MAP, sync=False, metasync=False, lock=False)
        self._batch: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def put(self, key: bytes, value: bytes) -> None:
        self._batch.append((key, value))
        self._bytes += len(value)
        if self._bytes > _BATCH_BYTES or len(self._batch) >= _BATCH_ITEMS:
            self._flush()

    def _flush(self) -> None:
        while self._batch:
            try:
                with self.environment.begin(write=True) as transaction:
                    for key, value in self._batch:
                        transaction.put(key, value)
                break
            except lmdb.MapFullError:
                self.environment.set_mapsize(max(2 * self.environment.info()["map_size"], 4 * self._bytes))
            except (lmdb.Error, OSError) as error:
                raise _full(self.folder, error) from None
        self._batch, self._bytes = [], 0

    def close(self) -> None:
        """Write what is left and bring everything to the disk."""
        try:
            self._flush()
            self.environment.sync(True)
        except (lmdb.Error, OSError) as error:
            raise _full(self.folder, error) from None
        finally:
            self.environment.close()


def _full(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder}: the store could not be written ({error}). A store that was there before is untouched; "
        "free some space or choose another place."
    )
