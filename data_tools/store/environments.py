"""LMDB environments: reading ones shared inside a process and never across a fork, writing ones that grow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import lmdb

from data_tools.errors import RequestError, UserError
from data_tools.store.pages import MEND, walk

Identity = tuple[int, int, int, int]  # device, inode, bytes, time of change


@dataclass
class _Opened:
    process: int
    environment: lmdb.Environment
    users: int = 0


_open: dict[tuple[int, int], _Opened] = {}  # by device and inode
walked: set[Identity] = set()  # files whose pages lead nowhere else, by this process or the one it comes from
_FIRST_MAP, _LARGEST_STEP = 16 * 2**20, 2**30
BATCH_BYTES, BATCH_ITEMS = 32 * 2**20, 16384  # of one transaction: that much is lost by a kill, and held in memory
_SYNCHRONOUS = True  # tests of many small builds turn it off: it matters for a power cut only


def identity(file: Path) -> Identity:
    """What tells one state of a file from another.

    Raises:
        RequestError: it is not there, or cannot be read.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror}). {MEND}") from None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_readonly(folder: Path) -> lmdb.Environment:
    """The environment of this process for `folder`, after a look at the pages LMDB will follow.

    LMDB allows one per process and file, and none that came through a fork. A folder that was replaced holds another
    file and is opened anew.

    Raises:
        RequestError: not a readable LMDB file.
        DataFault: it is damaged, or was copied in part.
    """
    file = folder / "data.mdb"
    found = identity(file)
    if found not in walked:
        walk(file)
    opened = _open.get(found[:2])
    if opened is not None and opened.process != os.getpid():
        opened.environment.close()  # the parent's; closing our copy does not touch it, and LMDB opens no file twice in one process
        opened = None
    if opened is None:
        try:
            # No lock file: a store never changes once it is there, and may lie on a read-only disk.
            environment = lmdb.open(
                _named(folder), readonly=True, create=False, lock=False, readahead=False, max_spare_txns=4
            )
        except lmdb.Error as error:
            raise RequestError(f"{file} is not a readable LMDB file ({error}). {MEND}") from None
        opened = _Opened(os.getpid(), environment)
    if identity(file) != found:  # replaced between the look and the opening
        if not opened.users:
            opened.environment.close()
        return open_readonly(folder)
    opened.users += 1
    _open[found[:2]] = opened
    walked.add(found)
    return opened.environment


def _named(folder: Path) -> str | bytes:
    """As LMDB takes it: a name that is not UTF-8 as its bytes."""
    return os.fsencode(folder) if os.name == "posix" else str(folder)


def is_open(found: Identity, environment: lmdb.Environment) -> bool:
    """Whether `environment` is this process's for the file of that identity."""
    opened = _open.get(found[:2])
    return opened is not None and opened.environment is environment and opened.process == os.getpid()


def close_readonly(environment: lmdb.Environment) -> None:
    """Close an environment of this process when its last user does: Windows renames no open file."""
    for key, opened in list(_open.items()):
        if opened.environment is environment and opened.process == os.getpid():
            opened.users -= 1
            if not opened.users:
                del _open[key]
                environment.close()


class GrowingWriter:
    """Key-value pairs into LMDB; the map doubles when it is full, so no size is asked for or reserved.

    `write` is one synchronous transaction: whatever happens, the file holds whole batches.

    Raises:
        UserError: the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        try:
            self.environment = lmdb.open(  # the mode is cut by the umask; without one it is 0644
                _named(folder), map_size=_FIRST_MAP, lock=False, readahead=False, sync=_SYNCHRONOUS, mode=0o777
            )
        except lmdb.Error as error:
            raise write_error(folder, error) from None

    def get(self, key: bytes) -> bytes | None:
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def write(self, batch: list[tuple[bytes, bytes]], *, drop: bytes | None = None) -> None:
        """Write `batch` and remove the key `drop`, in one transaction."""
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(batch)
                    if drop:
                        transaction.delete(drop)
                return
            except lmdb.MapFullError:
                size = self.environment.info()["map_size"]
                waiting = sum(len(value) for _, value in batch)
                self.environment.set_mapsize(size + max(min(size, _LARGEST_STEP), 2 * waiting))
            except (lmdb.Error, OSError) as error:
                raise write_error(self.folder, error) from None

    def close(self) -> None:
        """Close the file and give back what the map reserved (Windows extends the file to the map)."""
        information, page = self.environment.info(), self.environment.stat()["psize"]
        self.environment.close()
        file, used = self.folder / "data.mdb", (information["last_pgno"] + 1) * page
        if file.stat().st_size > used:
            os.truncate(file, used)


def write_error(folder: Path, error: Exception) -> UserError:
    """A full disk or a folder without rights, in words."""
    return UserError(
        f"{folder}: the store could not be written ({error}). A store that was there before is untouched. "
        "Free some space or choose another place; an interrupted build goes on with --continue."
    )
