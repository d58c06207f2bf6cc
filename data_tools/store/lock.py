"""One build at a time per place: a lock the operating system takes back when the process dies."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import RequestError


class BuildLock:
    """Held from construction to `release`.

    Raises:
        RequestError: another process builds here.
    """

    def __init__(self, file: Path) -> None:
        self._handle = file.open("a+b")
        try:
            try:
                import fcntl
            except ImportError:
                import msvcrt

                self._handle.seek(0)
                msvcrt.locking(self._handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._handle.close()
            raise RequestError(
                f"{file.parent}: another process is building this store. Wait for it, or stop it."
            ) from None

    def release(self) -> None:
        self._handle.close()
