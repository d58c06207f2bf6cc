"""The official source files: `{split}_imgs.tsv` and `{split}_texts.jsonl` in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.annotations import read_images, read_texts
from data_tools.errors import RequestError
from data_tools.items import Item, Stream, fingerprint_of

_BUFFER = 2**20


class OfficialSource:
    """One split of the official layout; images first, then texts.

    Raises (on `open`):
        RequestError: a file is missing.
    """

    kind = "official"

    def __init__(self, folder: Path, split: str, expected: dict[str, int] | None = None) -> None:
        self.folder, self.split, self._expected = folder, split, expected or {}
        self.images, self.texts = folder / f"{split}_imgs.tsv", folder / f"{split}_texts.jsonl"

    def open(self) -> Stream:
        if not self.folder.is_dir():
            raise RequestError(
                f"{self.folder}: no such folder. Name the one with {self.images.name} and {self.texts.name}."
            )
        for file in (self.images, self.texts):
            if not file.is_file():
                raise RequestError(f"{file}: no such file{self._splits_there()}")
        total = self.images.stat().st_size + self.texts.stat().st_size
        position = _Position()
        return Stream(self._items(position), total=total, unit="B", tell=position.tell)

    def _splits_there(self) -> str:
        found = sorted(file.name.removesuffix("_imgs.tsv") for file in self.folder.glob("*_imgs.tsv"))
        return f". Splits in {self.folder}: {', '.join(found) or 'none'}."

    def _items(self, position: _Position) -> Iterator[Item]:
        with position.reading(self.images) as handle:
            yield from read_images(handle, self.images)
        with position.reading(self.texts) as handle:
            yield from read_texts(handle, self.texts)

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(self.images, self.texts)}

    def expected(self) -> dict[str, int]:
        return self._expected


class _Position:
    """Bytes read so far over several files."""

    def __init__(self) -> None:
        self._before = 0
        self._handle: BinaryIO | None = None

    def reading(self, file: Path) -> BinaryIO:
        self._before = self.tell()
        self._handle = file.open("rb", buffering=_BUFFER)
        return self._handle

    def tell(self) -> int:
        if self._handle is None:
            return 0
        here = Path(self._handle.name).stat().st_size if self._handle.closed else self._handle.tell()
        return self._before + here
