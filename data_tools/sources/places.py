"""From a name in a table or a caption file to a file below the folder of images, and no other unless that is allowed."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_tools.errors import DataFault
from data_tools.store.layouts import is_text

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Root:
    """A folder of images.

    Args:
        outside: whether names may lead out of it; `followed` counts those that did.
    """

    def __init__(self, folder: Path, outside: bool = False) -> None:
        self.folder, self.outside, self.followed = folder, outside, 0
        self._top = os.path.realpath(folder)
        self._parent = lru_cache(4096)(os.path.realpath)

    def find(self, name: str) -> tuple[Path, str]:
        """The file that `name` means, and its id: the path below the folder, or as written where it lies outside.

        Raises:
            DataFault: an address of the network, or a file outside.
        """
        name = name.strip()
        if name.lower().startswith("file://"):
            name = unquote(urlsplit(name).path)
        if _ADDRESS.match(name) and (here := self._downloaded(name)) is not None:
            name = here
        if _ADDRESS.match(name):
            raise DataFault(
                f"the image is an address ({name[:60]})",
                kind="remote-image",
                mend="Nothing is fetched: download it into the folder of images under the name it has there.",
            )
        drive = bool(_DRIVE.match(name))
        name = _plain(name.replace("\\", "/"))
        path = self.folder / name
        if not name.isascii() and not os.path.lexists(path):
            path = _as_unpacked(self.folder, name) or path
        if self._leads_out(path) or (drive and os.name != "nt"):
            if not self.outside:
                raise DataFault(
                    f"{name!r} lies outside of {self.folder}",
                    kind="outside",
                    mend="Add --allow-outside if you trust the file that names it, or name the folder with --images.",
                )
            self.followed += 1
        elif os.path.isabs(name):
            name = _plain(os.path.relpath(path, self.folder).replace(os.sep, "/"))
        return path, readable(name)

    def _downloaded(self, address: str) -> str | None:
        """The file of an address's name in the folder: ``https://…/a/b.jpg?x=1`` → ``b.jpg``."""
        name = unquote(urlsplit(address).path).rpartition("/")[2]
        return name if name and "\0" not in name and (self.folder / name).is_file() else None

    def _leads_out(self, path: Path) -> bool:
        try:
            place = os.path.join(self._parent(os.path.dirname(path)), os.path.basename(path))
            if os.path.basename(path) in ("", ".", "..") or os.path.islink(place):
                place = os.path.realpath(path)
            return os.path.commonpath([place, self._top]) != self._top
        except ValueError:  # a NUL in the name, or another drive of Windows
            return "\0" not in str(path)

    def check(self, path: Path) -> None:
        """That a file found in the folder itself is no link out of it.

        Raises:
            DataFault: it is.
        """
        if not self.outside and self._leads_out(path):
            raise DataFault(
                f"{path.name!r} is a link out of {self.folder}",
                kind="outside",
                mend="Add --allow-outside if you trust it.",
            )

    def notes(self) -> list[str]:
        """What the report says of it."""
        return [f"{self.followed:,} names lead out of {self.folder} and were followed"] if self.followed else []


def _plain(name: str) -> str:
    """Without ``./`` and doubled slashes; ``..`` stays: what it means depends on links."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + "/".join(parts)


def _as_unpacked(folder: Path, name: str) -> Path | None:
    """A zip of a Chinese Windows, unpacked elsewhere, leaves file names in GBK."""
    try:
        path = folder / os.fsdecode(name.encode("gb18030"))
        return path if os.path.lexists(path) else None
    except (UnicodeError, ValueError):
        return None


def readable(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 are read as GBK, or written ``\\xff``."""
    if is_text(name):
        return name
    data = name.encode("utf-8", "surrogateescape") if _from_disk(name) else name.encode("utf-8", "surrogatepass")
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError:
        return data.decode("utf-8", "backslashreplace")


def _from_disk(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
