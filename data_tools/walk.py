"""Which files below a folder are pictures: one answer for import, encode, classify and search.

Nothing is passed over in silence: what is no picture is counted by kind, and `Walk.lines` says it.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from data_tools.errors import RequestError

# What Pillow opens, by the names it has in the world; the content decides in the end.
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# Pictures all the same, that nothing here can open.
TO_CONVERT = frozenset((
    ".heic", ".heif", ".hif", ".svg", ".psd", ".psb", ".jp2", ".j2k", ".jxl", ".jxr", ".eps", ".ai", ".ico", ".tga",
    ".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw",
))  # fmt: skip
_OF_SYSTEMS = frozenset(
    ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "ehthumbs.db", "$recycle.bin", "#recycle", "lost+found",
     "system volume information")
)  # fmt: skip
_DIGITS = re.compile("([0-9]+)")
_SHOWN = 3

HIDDEN, OTHER, CONVERT = "hidden", "of other endings", "of formats that are not read"
EMPTY_LINK, OUTSIDE, AGAIN = (
    "links to nothing",
    "links out of the folder",
    "links in a circle or to a folder met before",
)
SPECIAL, CLOSED = "no files (pipes, devices)", "that may not be read"
_MENDS = {
    CONVERT: "convert them to JPEG or PNG",
    OUTSIDE: "--allow-outside follows them",
    CLOSED: "give yourself the right to",
}


class Found(NamedTuple):
    """A picture: its path below the folder with forward slashes, bytes, and time of change in nanoseconds."""

    name: str
    size: int
    changed: int


@dataclass
class Walk:
    """The pictures below `folder` in natural order, and what was passed over.

    `totals` are number, bytes and latest change of all regular files that were met: whether a folder is as it was.
    """

    folder: Path
    pictures: list[Found] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    followed: list[str] = field(default_factory=list)  # links
    closed: list[str] = field(default_factory=list)  # places that could not be looked into
    totals: list[int] = field(default_factory=lambda: [0, 0, 0])

    def names(self) -> list[str]:
        return [found.name for found in self.pictures]

    def is_read(self, file: Path) -> None:
        """The caller itself reads `file`: where it lies in the folder, it is not passed over."""
        if file.resolve().is_relative_to(self.folder.resolve()) and self.endings[file.suffix.lower()]:
            self.endings[file.suffix.lower()] -= 1

    def lines(self, used: Iterable[str] = ()) -> list[str]:
        """What was passed over and which links were followed, for people.

        Args:
            used: endings of files that the caller itself reads (``.txt`` with captions).
        """
        used, parts = frozenset(used), []
        for kind in (HIDDEN, OTHER, CONVERT, EMPTY_LINK, OUTSIDE, AGAIN, SPECIAL, CLOSED):
            count, shown = self.passed[kind], ", ".join(self.examples.get(kind, ()))
            if kind in (OTHER, CONVERT):
                wanted = {
                    e: n
                    for e, n in self.endings.most_common()
                    if n and e not in used and (e in TO_CONVERT) == (kind == CONVERT)
                }
                count, shown = sum(wanted.values()), ", ".join(f"{e or 'none'} {n:,}" for e, n in wanted.items())
                if kind == CONVERT:
                    shown += f"; {', '.join(self.examples.get(kind, ()))}"
            if count:
                more = ", …" if kind not in (OTHER, CONVERT) and count > _SHOWN else ""
                mend = f"; {_MENDS[kind]}" if kind in _MENDS else ""
                parts.append(f"{count:,} {kind} ({shown}{more}{mend})")
        lines = [f"passed over: {', '.join(parts)}"] if parts else []
        if self.followed:
            more = ", …" if len(self.followed) > _SHOWN else ""
            lines.append(f"followed {len(self.followed):,} links ({', '.join(self.followed[:_SHOWN])}{more})")
        return lines

    def nothing(self) -> RequestError:
        """That there is no picture, with what is there instead."""
        said = "".join(f"; {line}" for line in self.lines())
        return RequestError(f"{self.folder} holds no pictures ({' '.join(ENDINGS)}){said}")

    def _pass(self, kind: str, name: str) -> None:
        self.passed[kind] += 1
        if kind in (CLOSED, EMPTY_LINK):
            self.closed.append(name)
        examples = self.examples.setdefault(kind, [])
        if len(examples) < _SHOWN:
            examples.append(name)


def is_picture(name: str) -> bool:
    """Whether a file of this name counts as a picture."""
    return ending_of(name) in ENDINGS


def ending_of(name: str) -> str:
    """``.jpg`` of ``a/B.JPG``; empty where there is none."""
    return PurePath(name).suffix.lower()


def is_hidden(name: str) -> bool:
    """Hidden files and folders, and what systems leave behind (`__MACOSX`, `Thumbs.db`, resource forks)."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def natural(name: str) -> list[tuple[list[tuple[int, str]], str]]:
    """Sorts ``a/2.jpg`` before ``a/10.jpg``, the same on every system; part by part, so that a folder stays together."""
    # Numbers compare by length, then by digits: `int` refuses very long ones.
    return [
        (
            [
                (len(bare := part.lstrip("0")), bare) if at % 2 else (0, part)
                for at, part in enumerate(_DIGITS.split(own))
            ],
            own,
        )
        for own in name.split("/")
    ]


def walk(folder: str | Path, *, outside: bool = True, each: Callable[[], object] | None = None) -> Walk:
    """Look through a folder and its sub-folders; no file is opened.

    Linked files and folders are followed, each folder once: real ones go before links to them, so loops end and names
    do not depend on the order of the disk.

    Args:
        outside: follow links that lead out of the folder; else they are counted as passed over.
        each: called for every picture found (a progress bar's `update`).

    Raises:
        RequestError: no such folder, or it may not be read.
    """
    top = Path(folder)
    try:
        with os.scandir(top):
            pass
        root = os.path.realpath(top)
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: no folder that can be read ({getattr(error, 'strerror', error)})") from None
    found, known = Walk(top), set[tuple[int, int]]()
    real, links = [("", str(top))], list[tuple[str, str]]()  # name below the folder, path
    while real or links:
        if not real:  # now the linked folders, in order
            links.sort(key=lambda link: natural(link[0]), reverse=True)
            name, path = links.pop()
            if _inside(root, os.path.realpath(path)) or _identity(os.stat(path)) in known:
                found._pass(AGAIN, name)
                continue
            found.followed.append(name)
            real.append((name, path))
        here, place = real.pop()
        try:
            identity = _identity(os.stat(place))
            if here and identity in known:  # a mounted folder, or below a followed link
                found._pass(AGAIN, f"{here}/")
                continue
            known.add(identity)
            with os.scandir(place) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError:
            found._pass(CLOSED, f"{here}/")
            continue
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            if is_hidden(entry.name):
                found._pass(HIDDEN, name)
                continue
            try:
                link = entry.is_symlink()
                status = entry.stat()
            except OSError:
                found._pass(EMPTY_LINK if link else CLOSED, name)
                continue
            if getattr(status, "st_file_attributes", 0) & 0x2:  # hidden on Windows
                found._pass(HIDDEN, name)
            elif link and not outside and not _inside(entry.path, root):
                found._pass(OUTSIDE, name)
            elif stat.S_ISDIR(status.st_mode):
                # A junction of Windows is no symlink and leads elsewhere all the same.
                away = link or getattr(entry, "is_junction", bool)()
                (links if away else real).append((name, entry.path))
            elif not stat.S_ISREG(status.st_mode):
                found._pass(SPECIAL, name)
            else:
                _take(found, name, link, status, each)
    found.pictures.sort(key=lambda picture: natural(picture.name))
    return found


def _take(found: Walk, name: str, link: bool, status: os.stat_result, each: Callable[[], object] | None) -> None:
    number, size, latest = found.totals
    found.totals = [number + 1, size + status.st_size, max(latest, status.st_mtime_ns)]
    ending = ending_of(name)
    if ending not in ENDINGS:
        found.endings[ending] += 1
        found._pass(CONVERT if ending in TO_CONVERT else OTHER, name)
        return
    if link:
        found.followed.append(name)
    found.pictures.append(Found(name, status.st_size, status.st_mtime_ns))
    if each is not None:
        each()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _inside(path: str, root: str) -> bool:
    """Whether `path` is `root` or below it, links resolved."""
    try:
        return os.path.commonpath([os.path.realpath(path), root]) == root
    except ValueError:  # Windows: another drive
        return False
