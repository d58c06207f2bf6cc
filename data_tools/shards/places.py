"""Which shards a place means: a pattern, a folder of tars or Parquet files, or one file."""

from __future__ import annotations

import glob
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_tools.errors import RequestError
from data_tools.regular import regular
from data_tools.sources.patterns import expand
from data_tools.walk import natural

TAR, PARQUET = ".tar", ".parquet"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_MARKS = "{*?["
_NAMED = 3


def kind_of(name: str | Path) -> str | None:
    """``.tar`` or ``.parquet`` by the ending; a packed tar is a tar, too; None: no shard."""
    name = str(name).lower()
    return TAR if name.endswith((TAR, *_PACKED)) else PARQUET if name.endswith(PARQUET) else None


def is_pattern(place: str | Path) -> bool:
    """Whether `place` names shards by braces or marks; what lies there by that very name is none."""
    return any(mark in str(place) for mark in _MARKS) and not os.path.lexists(place)


def is_shards(place: str | Path) -> bool:
    """By its name, or by the files in the folder."""
    path = Path(place)
    if path.is_dir():
        with os.scandir(path) as entries:
            return any(kind_of(entry.name) for entry in entries)
    return kind_of(place) is not None and (is_pattern(place) or path.exists())


def shard_files(place: str | Path) -> list[Path]:
    """The shards in their order: that of braces, else of their names (numbers in Parquet files' names count as such).

    Raises:
        RequestError: none is there, one is missing, stands twice, is packed or no regular file; or tars and Parquet files.
    """
    path = Path(place)
    found = _in_folder(path) if path.is_dir() else _of_pattern(str(place)) if is_pattern(place) else [path]
    if not found:
        raise RequestError(f"{place}: no shard has such a name")
    missing = [file for file in found if not file.exists()]
    if missing:
        names = ", ".join(map(str, missing[:_NAMED])) + (" …" if len(missing) > _NAMED else "")
        raise RequestError(
            f"{place}: {len(missing):,} of {len(found):,} shards are missing ({names}). Bring them back, or name those that are there."
        )
    packed = [file for file in found if str(file).lower().endswith(_PACKED)]
    if packed:
        raise RequestError(unpack(packed[0]))
    for file in found:
        regular(file)
    kinds = {kind_of(file) for file in found}
    if None in kinds:
        other = next(file for file in found if kind_of(file) is None)
        raise RequestError(f"{other} is neither a tar nor a Parquet file; leave it out of {place}")
    if len(kinds) > 1:
        raise RequestError(f"{place}: tars and Parquet files are two kinds of shards; name one of them: '{path}/*.tar'")
    twice = [file for file, times in Counter(map(os.path.realpath, found)).items() if times > 1]
    if twice:
        raise RequestError(f"{place}: {twice[0]} stands twice; name every shard once")
    return found


def unpack(file: Path) -> str:
    """What is said of a packed tar: nothing in it can be read by its place."""
    name = str(file).lower()
    unpacker = next(
        (tool for mark, tool in (("bz2", "bunzip2"), ("xz", "unxz"), ("zst", "unzstd")) if mark in name), ""
    )
    line = shlex.join([unpacker or "gunzip", "-k", str(file)])
    return (
        f"{file} is packed, so no picture in it can be read by its place. Pictures hardly shrink; unpack it: {line}"
        f"{'' if name.endswith(_PACKED) else f', under a name that says so (mv {file.name} {file.name}.gz)'}"
    )


def _of_pattern(pattern: str) -> list[Path]:
    names = list(expand(pattern)) if "{" in pattern else [pattern]
    files: list[Path] = []
    for name in names:
        files += [Path(file) for file in _sorted(glob.glob(name))] if is_pattern(name) else [Path(name)]
    return files


def _sorted(names: Sequence[str]) -> list[str]:
    """In the order in which `data import` reads them."""
    return sorted(names, key=natural if all(kind_of(name) == PARQUET for name in names) else None)


def _in_folder(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        there = list(entries)
    names = [entry.name for entry in there if kind_of(entry.name) and not entry.is_dir()]
    inner = [entry.name for entry in there if entry.is_dir() and not entry.name.startswith((".", "cnclip-ft."))]
    tars = {name.rpartition(".")[0] for name in names if kind_of(name) == TAR}
    # Beside its tars img2dataset lays what it knows of them as Parquet, under the same names and without pictures.
    if tars and all(name.rpartition(".")[0] in tars for name in names):
        names = [name for name in names if kind_of(name) == TAR]
    for name in sorted(inner):
        with os.scandir(folder / name) as entries:
            if any(kind_of(entry.name) for entry in entries):
                raise RequestError(
                    f"{folder}: its folder {name} holds shards as well, and a folder is read without those in it. "
                    f"Name all of them: '{folder}/*/*.tar', or '{folder}/{{{name},…}}/*.tar'"
                )
    return [folder / name for name in _sorted(names)]
