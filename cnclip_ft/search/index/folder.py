"""An index on the disk: features and what they are of.

::

    index.json          format, model, source, counts, and the names of the files that count now
    features-N.npy      [pictures, dim] float32 or float16, unit length; memory-mapped
    items-N.jsonl       [key, stamp] a line, in the same order, and where something is kept of a picture {column: value};
                        offsets-N.npy: where each line begins
    damaged-N.jsonl     [key, stamp, fault] of pictures that cannot be decoded
    approximate-N.faiss faiss's own file, where one was built

A new state is written as files of the next number N beside the old ones; the moment `index.json` is renamed it
counts, and the old files go. So an index is whole at every moment, and a server that has it open keeps its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from cnclip_ft.search.index.listing import Key
from data_tools.arrays import write_array
from data_tools.atomic import LEFTOVER, leftovers, whole_file
from data_tools.errors import RequestError, UserError
from data_tools.outputs import FolderKind, folder_with
from data_tools.store.layouts import Value

FORMAT, WITH_COLUMNS = 1, 2  # 2: items have columns
INFO = "index.json"
PARTS = "parts"
_NUMBERED = re.compile(r"(features|items|offsets|damaged|approximate)-\d+\.(npy|jsonl|faiss)")
_PART_FILES = rf"plan\.json|\d{{8}}\.(npy|jsonl|writing)|{LEFTOVER}"


_FINISHED = folder_with(INFO, "format", "files", "source")
_BEGUN = folder_with(f"{PARTS}/plan.json", "checksum", "image_size")


def _is_ours(folder: Path) -> bool:
    """An index or the beginning of one."""
    if _FINISHED(folder) or _BEGUN(folder):
        return True
    return list(map(str, folder.iterdir())) == [str(folder / "lock")]  # begun, and stopped at once


PART_FILES = FolderKind("folder of parts", lambda folder: _is_ours(folder.parent), re.compile(_PART_FILES))
INDEX = FolderKind(
    "index",
    _is_ours,
    re.compile(rf"{re.escape(INFO)}|lock|index\.json\.writing|{LEFTOVER}|{_NUMBERED.pattern}|{PARTS}/({_PART_FILES})"),
)
_Name = Annotated[str, Field(pattern=f"^{_NUMBERED.pattern}$")]  # never a path


class _Files(BaseModel):
    features: _Name
    items: _Name
    offsets: _Name
    damaged: _Name
    approximate: _Name | None = None


class _Source(BaseModel):
    kind: Literal["folder", "store"]
    name: str
    path: str


class _Approximate(BaseModel):
    kind: str
    effort: Annotated[int, Field(ge=1)]


class _Info(BaseModel):
    """What the rest reads of `index.json`."""

    images: Annotated[int, Field(ge=0)]
    dim: Annotated[int, Field(ge=1)]
    largest_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    checkpoint: dict[str, Any]
    identity: dict[str, Any]
    source: _Source
    files: _Files
    approximate: _Approximate | None = None
    columns: str | None = None


class Damaged(RequestError):
    """A file of the index is not what was written."""

    def __init__(self, folder: str | Path, what: object) -> None:
        # Nothing is written over that cannot be known for an index.
        how = "with --rebuild" if _is_ours(Path(folder)) else "with another --output, or remove the folder first"
        super().__init__(
            f"{folder}: the index is damaged ({what}); make it anew: give its `search index` command {how}"
        )


class Index:
    """An index opened for reading; features and items stay on the disk until they are used.

    Raises:
        RequestError: there is none, it is unfinished, damaged or of a format this version does not know.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        files = self.info["files"]
        try:
            # Copy on write: torch wants memory it may write to; nothing here does.
            self.features: np.ndarray = np.load(self.folder / files["features"], mmap_mode="c")
            self._offsets: np.ndarray = np.load(self.folder / files["offsets"], mmap_mode="r")
            items = self.folder / files["items"]
            # Not an open file with seek: several threads of a server ask at once.
            self._lines: Any = np.memmap(items, mode="r") if items.stat().st_size else b""
        except (OSError, ValueError, EOFError) as error:  # numpy: headers that are none, files cut short
            raise Damaged(folder, error) from None
        shape, kind = (len(self), self.info["dim"]), self.features.dtype.name
        if self.features.shape != shape or kind not in ("float16", "float32"):
            raise Damaged(folder, f"{files['features']} holds {self.features.shape} values of {kind}, not {shape}")
        if self._offsets.shape != (len(self) + 1,) or self._offsets.dtype != np.uint64:
            raise Damaged(folder, f"{files['offsets']} does not fit {len(self):,} pictures")
        if self._offsets[0] != 0 or self._offsets[-1] != len(self._lines):
            raise Damaged(
                folder,
                f"{files['items']} has {len(self._lines):,} bytes, not {self._offsets[-1]:,}: it was cut or changed",
            )

    def __len__(self) -> int:
        return self.info["images"]

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    def item(self, number: int) -> tuple[Key, str]:
        """(key, stamp) of a picture.

        Raises:
            IndexError: no such number.
            Damaged: what stands there is no item.
        """
        return self._item(number)[:2]

    def _item(self, number: int) -> tuple[Any, ...]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return self._row(bytes(self._lines[begin:end]), number, 2)

    def key(self, number: int) -> Key:
        return self.item(number)[0]

    def described(self, number: int) -> tuple[Key, dict[str, Value]]:
        """(key, what is kept of it) of a picture; errors as `item`."""
        return _described(self._item(number))

    def columns(self) -> Iterator[dict[str, Value]]:
        """What is kept of every picture, in order."""
        for row in self._rows("items", 2):
            yield _described(row)[1]

    def stamps(self) -> dict[Key, str]:
        """Every picture's stamp, in order."""
        stamps = {row[0]: row[1] for row in self._rows("items", 2)}
        if len(stamps) != len(self):
            raise Damaged(
                self.folder, f"{self.info['files']['items']} names {len(stamps):,} pictures, not {len(self):,}"
            )
        return stamps

    @cached_property
    def damaged(self) -> dict[Key, tuple[str, str]]:
        """Key → (stamp, fault) of the pictures that could not be decoded."""
        return {key: (stamp, fault) for key, stamp, fault in self._rows("damaged", 3)}

    def _rows(self, what: str, width: int) -> Iterator[tuple[Any, ...]]:
        path = self.folder / self.info["files"][what]
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file):
                    yield self._row(line, number, width, what)
        except OSError as error:
            raise Damaged(self.folder, error) from None

    def _row(self, line: bytes, number: int, width: int, what: str = "items") -> tuple[Any, ...]:
        """A key, and `width` − 1 texts."""
        try:
            row = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(row, list)
            if whole and what == "items" and len(row) == 3 and isinstance(row[2], dict):
                whole = type(row[0]) in (int, str) and isinstance(row[1], str)
            else:
                whole = whole and len(row) == width
                whole = whole and type(row[0]) in (int, str) and all(isinstance(text, str) for text in row[1:])
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise Damaged(self.folder, f"{self.info['files'][what]}, line {number + 1:,}: {line[:40]!r} is no entry")
        return tuple(row)

    @property
    def approximate_file(self) -> Path | None:
        name = self.info["files"].get("approximate")
        return self.folder / name if name else None


def _described(row: tuple[Any, ...]) -> tuple[Key, dict[str, Value]]:
    return row[0], row[2] if len(row) == 3 else {}


def is_index(folder: str | Path) -> bool:
    return (Path(folder) / INFO).is_file()


def read_info(folder: str | Path) -> dict[str, Any]:
    """`index.json`.

    Raises:
        RequestError: as `Index`.
    """
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        known = info.get("format")
    except FileNotFoundError:
        unfinished = (Path(folder) / PARTS).is_dir()
        hint = (
            "it is unfinished: give the `search index` command again"
            if unfinished
            else "make one: cnclip-ft search index"
        )
        raise RequestError(f"{folder} holds no index ({hint})") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Damaged(folder, f"{INFO}: {error}") from None
    if known not in (FORMAT, WITH_COLUMNS):
        raise RequestError(
            f"{path}: format {known!r} is not known here (known: {FORMAT}, {WITH_COLUMNS}); use a newer cnclip-ft"
        )
    try:
        _Info.model_validate(info, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise Damaged(folder, f"{INFO}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    return info


class IndexWriter:
    """The next state of an index: files of the next number, then `commit`.

    Raises (in every method):
        UserError: the disk is full or cannot be written; the old state is intact.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        used = [int(re.findall(r"\d+", name)[0]) for name in os.listdir(folder) if _NUMBERED.fullmatch(name)]
        self.number = max(used, default=0) + 1
        self.files: dict[str, str] = {}

    def _name(self, what: str, ending: str) -> Path:
        self.files[what] = f"{what}-{self.number}.{ending}"
        return self.folder / self.files[what]

    def features(self, rows: Iterable[np.ndarray], count: int, dim: int, dtype: np.dtype) -> None:
        """Write blocks ``[n, dim]``, `count` rows in all."""
        with _told(self.folder):
            with open(self._name("features", "npy"), "wb") as file:
                write_array(file, rows, (count, dim), dtype)
                _to_disk(file)

    def items(self, items: Sequence[Sequence[Any]]) -> None:
        offsets = np.zeros(len(items) + 1, dtype=np.uint64)
        with _told(self.folder):
            with open(self._name("items", "jsonl"), "wb") as file:
                for number, row in enumerate(items, 1):
                    line = _line(row)
                    offsets[number] = offsets[number - 1] + len(line)
                    file.write(line)
                _to_disk(file)
            with open(self._name("offsets", "npy"), "wb") as file:
                np.save(file, offsets)
                _to_disk(file)

    def damaged(self, rows: Iterable[tuple[Key, str, str]]) -> None:
        with _told(self.folder), open(self._name("damaged", "jsonl"), "wb") as file:
            file.writelines(map(_line, rows))
            _to_disk(file)

    def approximate(self, write: Any) -> None:
        """`write` is given the path."""
        with _told(self.folder):
            write(self._name("approximate", "faiss"))

    def keep(self, what: str, name: str) -> None:
        """A file of the old state that stays as it is."""
        self.files[what] = name

    def commit(self, info: dict[str, Any]) -> None:
        """From here on the new state counts."""
        content = {"format": WITH_COLUMNS if info.get("columns") else FORMAT, **info, "files": self.files}
        with whole_file(self.folder / INFO, "w", advice="Free some space and give the same command again.") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
        for path in leftovers(self.folder):
            path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if _NUMBERED.fullmatch(path.name) and path.name not in self.files.values():
                try:
                    path.unlink()
                except OSError:  # Windows: a server has it open; the next commit takes it
                    pass


def _line(row: Sequence[Any]) -> bytes:
    # A file name may hold bytes that are no UTF-8 (lone surrogates in Python): ASCII escapes carry them.
    return json.dumps(row).encode("ascii") + b"\n"


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class _told:  # noqa: N801 - reads as a word in a `with`
    """Turns an OSError into a message; nothing that counts has been touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}). What was there before is intact: free "
                "some space and give the same command again"
            ) from None
