"""Only regular files are read: a pipe is waited for without end, and a device has no end. And what a whole file sums to."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from data_tools.errors import RequestError


def regular(path: Path, most: int | None = None) -> int:
    """Size in bytes of a file that can be read to its end.

    Args:
        most: bytes it may have.

    Raises:
        RequestError: it is not there, is something else than a file, or is larger.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise RequestError(f"{path}: {kind}, not a file; name a regular file")
    if most is not None and found.st_size > most:
        raise RequestError(f"{path}: {found.st_size:,} bytes; such a file has at most {most:,}")
    return found.st_size


def sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
