"""A file or a folder is whole or it is not there: written beside its place, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_tools.errors import RequestError, UserError

LEFTOVER = r"\.cnclip-ft-[0-9a-f]{16}\.writing"  # pattern of the names beside
_BESIDE = ".cnclip-ft-{}.writing"  # short: the place's own name may be as long as the file system allows


@contextlib.contextmanager
def whole_file(
    path: str | Path, mode: str = "wb", *, advice: str = "Free some space or choose another place."
) -> Iterator[IO[Any]]:
    """A file to write that stands at `path` when the block ends well, and only then; missing folders are made.

    Links are followed: what they point at is replaced. Permissions are those of the file replaced, else as the umask
    says. A device, a pipe and anything under /dev is written straight into.

    Args:
        mode: ``wb``, or ``w`` for UTF-8 with bare line feeds.

    Raises:
        RequestError: a folder is there, or a file without the right to write.
        UserError: it cannot be written, ending in `advice`; what was there before is intact.
    """
    if mode not in ("wb", "w"):
        raise ValueError(mode)
    with _told(Path(path), advice) as told:
        if is_stream(path):
            with _open(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0)), mode) as file:
                yield file
            return
        with _beside(Path(path)) as told.beside, _open(told.beside, mode) as file:
            yield file
            file.flush()


@contextlib.contextmanager
def whole_path(path: str | Path, *, advice: str = "Free some space or choose another place.") -> Iterator[Path]:
    """As `whole_file`, for libraries that open the file themselves: gives an empty file beside `path`.

    Raises:
        RequestError, UserError: as `whole_file`; nor can `path` be a device here.
    """
    with _told(Path(path), advice) as told:
        if is_stream(path):
            raise RequestError(f"{path} is no ordinary file; name one")
        with _beside(Path(path)) as told.beside:
            yield told.beside


def is_stream(path: str | Path) -> bool:
    """A device or pipe; also /dev/stdout where it leads to a file, which others write to as well."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return os.path.exists(path)
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def _open(file: Path | int, mode: str) -> IO[Any]:
    if mode == "wb":
        return open(file, "wb")
    # Half characters of file names and texts become \\udc80, which is JSON too.
    return open(file, "w", encoding="utf-8", newline="\n", errors="backslashreplace")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise RequestError(f"{path} is a folder; name a file")
    if place.is_symlink():
        raise RequestError(f"{path} is a link that leads in a circle; choose another file")
    place.parent.mkdir(parents=True, exist_ok=True)
    permissions = None
    if place.exists():
        permissions = stat.S_IMODE(place.stat().st_mode)
        if not os.access(place, os.W_OK):
            raise RequestError(f"{path} is write-protected; choose another file, or give it the right to write")
    beside = place.with_name(_BESIDE.format(secrets.token_hex(8)))
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield beside
        if permissions is not None:
            os.chmod(beside, permissions)
        sync_file(beside)
        os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_folder(place.parent)


def usual_rights(file: Path) -> None:
    """Give `file`, whose library made it as a temporary one for the owner alone, the rights of any new file."""
    beside = file.with_name(_BESIDE.format(secrets.token_hex(8)))
    handle = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # the umask can be read by changing it only
    try:
        os.chmod(file, stat.S_IMODE(os.fstat(handle).st_mode))
    finally:
        os.close(handle)
        os.unlink(beside)


def sync_file(file: Path) -> None:
    """Bring what was written to `file` to the disk."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


class _told:  # noqa: N801 - reads as a word in a `with`
    """Turns an OSError of this file's writing into words; one that names another file is not ours to explain."""

    def __init__(self, path: Path, advice: str) -> None:
        self.path, self.advice, self.beside = path, advice, path

    def __enter__(self) -> _told:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and self._is_ours(error.filename):
            raise UserError(
                f"{self.path} cannot be written ({error.strerror or error}). What was there before is intact. {self.advice}"
            ) from None

    def _is_ours(self, name: Any) -> bool:
        if not isinstance(name, (str, bytes, os.PathLike)):
            return True
        named = Path(os.fsdecode(name))
        return (
            named in (self.path, self.beside)
            or named.name.startswith(_BESIDE[:11])
            or Path(os.path.realpath(self.path)).is_relative_to(named)
        )


def leftovers(folder: Path) -> list[Path]:
    """Files beside their place in `folder`, of writers that were killed or are at work: for owners that are alone there."""
    return sorted(folder.glob(_BESIDE.format("*")))


def sync_folder(folder: Path) -> None:
    """Bring a rename in `folder` to the disk; Windows neither can nor has to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems sync no folders
                os.fsync(handle)
        finally:
            os.close(handle)


def swap_in(new: Path, target: Path, old: Path) -> None:
    """Put the folder `new` at `target`; what was there ends up at `new`, or at `old` where the two cannot be exchanged.

    Between the two renames of the second way nothing is at `target`: `mend_interrupted_swap` brings the old one back.

    Raises:
        OSError: the folder cannot be renamed (on Windows: because a program has it open).
    """
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not _exchange(new, target):
        os.rename(target, old)
        os.rename(new, target)
    sync_folder(target.parent)


def mend_interrupted_swap(target: Path, old: Path) -> None:
    """Bring the old folder back if the process died between the two renames."""
    if not os.path.lexists(target) and old.is_dir():
        os.rename(old, target)


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
