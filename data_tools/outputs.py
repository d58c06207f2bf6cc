"""What a command may write over: nothing it reads, and only what is recognised, by its content, as written by us."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.atomic import is_stream
from data_tools.errors import RequestError

_NOBODYS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # file managers leave these everywhere


def refuse_overlap(output: str | Path, sources: Iterable[str | Path], *, inside: bool = True) -> None:
    """Refuse an output that is a source, holds one, or (with `inside`) lies in one.

    Files are told apart by device and number, not by name: links, hard links, `..` and letter case do not matter.

    Raises:
        RequestError: they overlap; the message names both.
    """
    if is_stream(output):
        return
    for source in sources:
        if not os.path.exists(source):
            continue
        own, above = _identity(source), [_identity(path) for path in _ancestors(output)]
        relation = (
            "is"
            if above and above[0] is not None and above[0] == own
            else "lies inside"
            if inside and own in above and os.path.isdir(source)
            else "holds"
            if os.path.exists(output) and _identity(output) in map(_identity, _ancestors(source))
            else None
        )
        if relation:
            raise RequestError(f"{output} {relation} {source}, which is read here; choose another output")


def _ancestors(path: str | Path) -> list[Path]:
    """The place itself and all folders above it, links followed."""
    place = Path(os.path.realpath(path))
    return [place, *place.parents]


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that we write: how it is known, and every file that belongs to it.

    Args:
        name: as in "a store".
        known: whether the folder's content says that it is one.
        files: pattern of the paths in it, with `/`.
    """

    name: str
    known: Callable[[Path], bool]
    files: re.Pattern[str]

    def foreign(self, folder: Path) -> str | None:
        """A path in `folder` that does not belong to this kind; links never do."""
        return next((path for path, plain in _walk(folder) if not plain or not self._belongs(path)), None)

    def _belongs(self, path: str) -> bool:
        return self.files.fullmatch(path) is not None or path.rpartition("/")[2] in _NOBODYS

    def refuse_other(self, folder: str | Path) -> None:
        """Refuse anything at `folder` but nothing, an empty folder, or one of this kind without a foreign file in it.

        Raises:
            RequestError: naming what is there.
        """
        place = Path(os.path.realpath(folder))
        if not os.path.lexists(place):
            return
        if not place.is_dir():
            raise RequestError(f"{folder} is no folder; choose another output")
        if is_empty(place):
            return
        mend = "It is not overwritten: choose another output, or move the file away."
        if not self.known(place):
            example = min(os.listdir(place))
            raise RequestError(f"{folder} is no {self.name} (it holds {example}). {mend}")
        foreign = self.foreign(place)
        if foreign is not None:
            raise RequestError(f"{folder} is a {self.name}, but {foreign} does not belong to one. {mend}")

    def clear(self, folder: Path, *, first: str = "") -> str | None:
        """Remove the files of this kind, `first` before the others, and the folders that become empty.

        Returns:
            What else lies there: it stays.
        """
        kept = None
        for path, plain in sorted(_walk(folder), key=lambda found: found[0] != first):
            if plain and self._belongs(path):
                os.unlink(folder / path)
            else:
                kept = kept or path
        for above, _, _ in os.walk(folder, topdown=False):
            try:
                os.rmdir(above)
            except OSError:
                pass  # not empty: something foreign is in it
        return kept


def is_empty(folder: Path) -> bool:
    """Whether nothing is in it but what file managers leave."""
    return folder.is_dir() and set(os.listdir(folder)) <= _NOBODYS


EMPTY = FolderKind("empty folder", is_empty, re.compile("(?!)"))  # for what is written to new places alone


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """(path in `folder`, whether it is an ordinary file) of everything but folders; an empty folder counts, with `/`."""
    for above, folders, files in os.walk(folder):
        names = [name for name in folders if os.path.islink(os.path.join(above, name))] + files
        for name in sorted(names):
            path = Path(above, name)
            yield path.relative_to(folder).as_posix(), stat.S_ISREG(path.lstat().st_mode)


def refuse_foreign_file(path: str | Path, known: Callable[[Path], bool], what: str) -> None:
    """Refuse to write over a file unless it is empty, a device or pipe, or `known` says that we wrote it.

    Args:
        what: what it should be, as in "a report of `data check`".

    Raises:
        RequestError: a folder, or a file that was not written by us.
    """
    place = Path(os.path.realpath(path))
    if is_stream(path) or not os.path.lexists(place):
        return
    if place.is_dir():
        raise RequestError(f"{path} is a folder; name a file")
    try:
        if place.stat().st_size == 0 or known(place):
            return
    except (OSError, ValueError, RecursionError):
        pass
    raise RequestError(
        f"{path} is there already and is not {what}: it is not overwritten. Choose another name, or move it away."
    )


def refuse_files(
    files: Iterable[tuple[str | Path | None, Callable[[Path], bool], str]], sources: Iterable[str | Path] = ()
) -> None:
    """`refuse_overlap` and `refuse_foreign_file` for every (path or None, known, what), before any work.

    Raises:
        RequestError: as those, or two of them are one file.
    """
    taken: dict[str, str | Path] = {}
    for path, known, what in files:
        if path is None:
            continue
        refuse_overlap(path, sources)
        refuse_foreign_file(path, known, what)
        place = os.path.realpath(path)
        if place in taken and not is_stream(path):
            raise RequestError(f"{path} is named for two outputs; choose two files")
        taken[place] = path


_ENDS = 64 * 1024


def begins(*starts: bytes) -> Callable[[Path], bool]:
    """Known by its first bytes."""

    def known(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)

    return known


def holds(sign: bytes) -> Callable[[Path], bool]:
    """Known by a sign within its first or last 64 KiB."""

    def known(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
            return sign in head or sign in file.read()

    return known


def json_with(*keys: str) -> Callable[[Path], bool]:
    """Known as a JSON object that has these keys."""

    def known(path: Path) -> bool:
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and set(keys) <= content.keys()

    return known


def folder_with(name: str, *keys: str) -> Callable[[Path], bool]:
    """A folder, known by its file `name`, a JSON object that has these keys."""

    def known(folder: Path) -> bool:
        try:
            return json_with(*keys)(folder / name)
        except (OSError, ValueError, RecursionError):
            return False

    return known


def lines_with(*keys: str) -> Callable[[Path], bool]:
    """Known as JSONL whose first line has these keys and no others before them."""

    def known(path: Path) -> bool:
        with open(path, "rb") as file:
            first = json.loads(file.readline(2**24))
        return isinstance(first, dict) and tuple(first)[: len(keys)] == keys

    return known
