"""The index of shards brought up to date: a part for every shard, made by whoever comes, and all of them joined.

It lies in ``cnclip-ft.index`` beside the shards; where that cannot be written, in the user's cache folder. As many processes as
like may be at it, on one machine or several: each takes a shard that nobody has, and all wait for the last.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_tools.atomic import leftovers, sync_folder
from data_tools.bars import Bar
from data_tools.cache import cache_folder
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock
from data_tools.shards.files import open_shard
from data_tools.shards.joining import FORMAT, META, VERSION, join
from data_tools.shards.part import Part, Stamp, index_shard, read_part
from data_tools.shards.places import is_pattern, shard_files
from data_tools.tables import note

FOLDER = "cnclip-ft.index"
_PART, _JOINED = "{}.part.npz", "joined-{}-{}"
_WAIT = 0.2  # seconds between looks at what others do

Say = Callable[[str], object]


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        note(text)


class Homes:
    """Where the index of shards in one folder is kept: beside them, or in the cache."""

    def __init__(self, folder: Path) -> None:
        place = Path(os.path.realpath(folder))
        mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
        self.beside, self.cached = place / FOLDER, cache_folder() / "shards" / mark
        self._own: Path | None = None

    def both(self) -> list[Path]:
        return [self.beside, self.cached]

    def own(self) -> Path:
        """The one that can be written.

        Raises:
            UserError: neither can.
        """
        if self._own is None:
            for place in self.both():
                with suppress(OSError):
                    place.mkdir(parents=True, exist_ok=True)
                    if os.access(place, os.W_OK | os.X_OK):
                        self._own = place
                        break
            else:
                raise UserError(
                    f"no place for the index of the shards: neither {self.beside} nor {self.cached} can be written. "
                    "Give one of them the right to write, or name a folder in CNCLIP_FT_CACHE."
                )
        return self._own


class Shards:
    """The shards of a place and their index.

    Args:
        place: a pattern, a folder or a file.

    Raises:
        RequestError: as `shard_files`.
    """

    def __init__(self, place: str | Path, say: Say = _say) -> None:
        self.place, self.say = place, say
        self.files = shard_files(place)
        self._homes: dict[Path, Homes] = {}
        self._refuse_gone()
        top = self.files[0].parent
        self.names = [_relative(file, top) for file in self.files]

    def homes(self, file: Path) -> Homes:
        return self._homes.setdefault(file.parent, Homes(file.parent))

    def _refuse_gone(self) -> None:
        """Shards of a folder, or of a pattern with marks, that have an index and are there no more."""
        path = Path(self.place)
        names = "*" if path.is_dir() else path.name if is_pattern(self.place) and "{" not in str(self.place) else None
        known = {file.name for file in self.files}
        for home in self.homes(self.files[0]).both() if names else ():
            kept = (
                (name.removesuffix(_PART.format("")) for name in os.listdir(home) if name.endswith(_PART.format("")))
                if home.is_dir()
                else ()
            )
            gone = sorted(name for name in kept if name not in known and fnmatch.fnmatchcase(name, names or ""))
            if gone:
                raise RequestError(
                    f"{self.place}: {gone[0]}{f' and {len(gone) - 1:,} more' if len(gone) > 1 else ''} is gone, and was there when the index "
                    f"was made. Bring it back; or, to go on without it, remove {home / _PART.format(gone[0])}."
                )

    def index(self, workers: int = 0) -> Path:
        """The folder of the joined index, which is made where it is not there or is of other shards.

        Args:
            workers: processes that read shards beside this one.

        Raises:
            RequestError: a shard is none.
            UserError: there is no place for it.
        """
        while True:
            found = self._joined()
            if found is not None:
                return found
            if self._parts(workers) and (made := self._join()) is not None:
                return made
            time.sleep(_WAIT)

    def _joined(self) -> Path | None:
        """The index of these very shards, or of copies of them."""
        for home in self.homes(self.files[0]).both():
            for folder in sorted(home.glob(_JOINED.format(self._mark(), "*"))):
                meta = read_meta(folder)
                if meta is None or [one["name"] for one in meta["shards"]] != self.names:
                    continue
                stamps = (Stamp.read(one["stamp"]) for one in meta["shards"])
                if all(stamp.problem(file) is None for stamp, file in zip(stamps, self.files, strict=True)):
                    return folder
        return None

    def _mark(self) -> str:
        return hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()[:8]

    def _part_file(self, file: Path) -> Path | None:
        """The file of a shard's part, where it is of this shard."""
        for home in self.homes(file).both():
            kept = home / _PART.format(file.name)
            if kept.is_file() and (part := read_part(kept)) is not None and part.stamp.problem(file) is None:
                return kept
        return None

    def _parts(self, workers: int) -> bool:
        """Make the parts that are missing and that nobody else is at; whether all are there now."""
        missing = [number for number, file in enumerate(self.files) if self._part_file(file) is None]
        sizes = [self.files[number].stat().st_size for number in missing]
        bar = Bar(total=sum(sizes), desc="index of the shards", unit="B", unit_scale=True, delay=1.0)
        with bar:
            if workers > 1 and len(missing) > 1:
                quiet = [(str(self.files[number]), self._told(number)) for number in missing]
                with ProcessPoolExecutor(min(workers, len(missing)), mp_context=get_context("spawn")) as pool:
                    done = list(pool.map(_make_alone, quiet))
                bar.update(sum(sizes))
            else:
                done = []
                for number, size in zip(missing, sizes, strict=True):
                    done.append(self._make(self.files[number], self._told(number)))
                    bar.update(size)
        return all(done)

    def _told(self, number: int) -> str | None:
        """What is said before a shard is read again."""
        file = self.files[number]
        for home in self.homes(file).both():
            part = read_part(home / _PART.format(file.name))
            if part is not None and (problem := part.stamp.problem(file)) is not None:
                return f"{file} is not the shard it was: {problem}. Its index is made anew."
        return None

    def _make(self, file: Path, told: str | None) -> bool:
        return _make(file, self.homes(file).own(), lambda: self._part_file(file) is not None, told, self.say)

    def _join(self) -> Path | None:
        """Join the parts; None where another process is at it."""
        home = self.homes(self.files[0]).own()
        mark = self._mark()
        lock = _claim(home / f"{mark}.joining")
        if lock is None:
            return None
        try:
            if (found := self._joined()) is not None:
                return found
            building = home / f"{mark}.building"
            shutil.rmtree(building, ignore_errors=True)
            for left in leftovers(home) if len(self._homes) == 1 else ():
                if left.stat().st_mtime < time.time() - 24 * 3600:
                    left.unlink(missing_ok=True)
            building.mkdir()
            read = lru_cache(4)(self._read)

            def picture(shard: int, offset: int, length: int) -> bytes:
                return opened(shard).read(offset, length)

            opened = lru_cache(4)(lambda shard: open_shard(self.files[shard], read(shard).about.get("image")))
            try:
                join(len(self.files), read, picture, self.names, building, Path(self.place).name)
            except OSError as error:
                raise UserError(
                    f"{home}: the index cannot be written ({error.strerror or error}). Free some space."
                ) from None
            meta = read_meta(building)
            assert meta is not None, "just written"
            for file in building.iterdir():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            target = home / _JOINED.format(mark, generation(meta)[:16])
            if target.exists():  # of an older version, or damaged
                shutil.rmtree(target, ignore_errors=True)
            os.rename(building, target)
            sync_folder(home)
            for other in home.glob(_JOINED.format(mark, "*")):
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)  # of shards that are no more
            return target
        finally:
            _let_go(lock)

    def _read(self, number: int) -> Part:
        kept = self._part_file(self.files[number])
        part = None if kept is None else read_part(kept)
        if part is None:
            raise UserError(
                f"{self.files[number]} changed while its index was made. Start again once it stays as it is."
            )
        return part


def generation(meta: dict[str, Any]) -> str:
    """32 hex digits of what the shards are: the same for copies of them, whatever their times."""
    content = [[one["name"], one["kind"], *Stamp.read(one["stamp"]).content()] for one in meta["shards"]]
    return hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()[:32]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What a joined index says of itself; None where it is none of this version."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT and meta["version"] == VERSION
        sizes = all(
            (folder / name).stat().st_size == size_of(kind, count) for name, (kind, count) in meta["arrays"].items()
        )
        return meta if known and sizes else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def size_of(kind: Any, count: int) -> int:
    """Bytes of an array as the description has it."""
    import numpy as np

    return int(np.dtype([tuple(field) for field in kind] if isinstance(kind, list) else kind).itemsize) * int(count)


def _relative(file: Path, top: Path) -> str:
    """A shard's name from the folder of the first: so the same after all of them were moved or copied."""
    return os.path.relpath(os.path.realpath(file.parent), os.path.realpath(top)).replace(os.sep, "/") + "/" + file.name


def _make(file: Path, home: Path, there: Callable[[], bool], told: str | None, say: Say) -> bool:
    lock = _claim(home / f"{file.name}.indexing")
    if lock is None:
        return False
    try:
        if not there():
            if told:
                say(told)
            index_shard(file).write(home / _PART.format(file.name))
        return True
    finally:
        _let_go(lock)


def _make_alone(task: tuple[str, str | None]) -> bool:
    """`_make` in a process of its own."""
    file = Path(task[0])
    shards = Shards.__new__(Shards)
    shards._homes, shards.say = {}, _say
    return shards._make(file, task[1])


def _claim(file: Path) -> FileLock | None:
    """None: another process holds it."""
    try:
        return FileLock(file, "making an index of shards")
    except RequestError:
        return None
    except OSError as error:
        raise UserError(f"{file.parent} cannot be written ({error.strerror or error}). Free some space.") from None


def _let_go(lock: FileLock) -> None:
    with suppress(OSError):  # Windows removes no open file
        lock.file.unlink()
    lock.release()
