"""One writer at a time: a lock the operating system takes back when the process dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from data_tools.errors import RequestError

_BYTE = 2**30  # the byte that Windows locks: behind the note, which others are to read


class FileLock:
    """Held from construction to `release`, or until the process ends. The file says who holds it: process and host.

    Args:
        what: what goes on here, for the message: "another process is …".
        note: what else the file says, as JSON.

    Raises:
        RequestError: another process holds it.
        OSError: the file cannot be opened, or is a link.
    """

    def __init__(self, file: Path, what: str, **note: str) -> None:
        self.file = file
        while True:
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            try:
                if not _lock(self._handle):
                    raise RequestError(
                        f"{file.parent}: another process is {what}{self._holder()}. Wait for it, or stop it."
                    )
                if self._in_place():
                    break
            except BaseException:
                os.close(self._handle)
                raise
            os.close(self._handle)  # its holder removed it before it let go: what we hold is no one's any more
        content = json.dumps({**note, "pid": os.getpid(), "host": socket.gethostname()}).encode()
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, content)  # over what is there: at no moment is the file empty again
            os.ftruncate(self._handle, len(content))

    def _in_place(self) -> bool:
        try:
            there = os.stat(self.file, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._handle))

    @property
    def held(self) -> bool:
        return self._handle >= 0

    def _holder(self) -> str:
        try:
            note = json.loads(os.read(self._handle, 1000))
            return f" (process {int(note['pid'])} on {str(note['host'])[:80]!r})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def release(self) -> None:
        """Let go; may be repeated."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _lock(handle: int) -> bool:
    """False: another has it. A file system that knows no locks cannot tell and lets everyone in."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return True
        os.lseek(handle, 0, os.SEEK_SET)
        return False
    return True
