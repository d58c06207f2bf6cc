"""One split of a public set: a list of image names, caption files, folders of images. The shared part of such sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, fingerprint_of
from data_tools.sources.caption_lines import read_captions, read_names
from data_tools.store.layouts import canonical_id


@dataclass(frozen=True)
class CaptionFile:
    """A caption file: its language, and how a sentence is cleaned."""

    path: Path
    language: str
    clean: Callable[[str], str] = str.strip


@dataclass
class CaptionedImagesSource:
    """Images in the order of the split's list, then the captions of each file on images of the list.

    Captions on other images belong to other splits: they are passed over and counted. An image without any caption is a fault.
    """

    kind: str
    names_file: Path
    captions: Sequence[CaptionFile]
    find_image: Callable[[str], Path]
    counts: dict[str, int] = field(default_factory=dict)
    encoding: str = "utf-8"

    def open(self) -> Stream:
        for file in (self.names_file, *(captions.path for captions in self.captions)):
            if not file.is_file():
                raise RequestError(f"{file}: no such file; it belongs to the published captions of this set")
        names = read_names(self.names_file, self.encoding)
        if not names:
            raise RequestError(f"{self.names_file} names no image")
        done = [0]
        total = len(names) + sum(_count_lines(captions.path) for captions in self.captions)
        notes: list[str] = []
        return Stream(self._items(names, done, notes), total, "line", lambda: done[0], notes)

    def _items(self, names: list[str], done: list[int], notes: list[str]) -> Iterator[Item]:
        for number, name in enumerate(names, start=1):
            done[0] += 1
            yield ImageItem(canonical_id(name), self.find_image(name), self.names_file, number)
        uncaptioned = dict.fromkeys(names)
        wanted, others = frozenset(names), 0
        for captions in self.captions:
            for line in read_captions(captions.path, captions.clean, self.encoding):
                done[0] += 1
                if isinstance(line, DataFault):
                    yield line
                elif line.image in wanted:
                    uncaptioned.pop(line.image, None)
                    yield TextItem(
                        line.mark, line.text, (canonical_id(line.image),), captions.language, captions.path, line.line
                    )
                else:
                    others += 1
        if others:
            notes.append(f"{others:,} captions of images that the list of this split does not name")
        for name in uncaptioned:
            yield DataFault(
                f"image {name} has no caption",
                mend="Are the caption files those of this split?",
                kind="missing-caption",
                file=self.names_file,
                item_id=canonical_id(name),
            )

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(self.names_file, *(captions.path for captions in self.captions))}

    def expected(self) -> dict[str, int]:
        return self.counts


def _count_lines(file: Path) -> int:
    with file.open("rb") as handle:
        return sum(1 for _ in handle)


def find_one(folders: Sequence[Path], names: Sequence[str], what: str) -> Path:
    """The first of `names` that exists in one of `folders`.

    Raises:
        RequestError: none does.
    """
    for folder in folders:
        for name in names:
            if (folder / name).exists():
                return folder / name
    raise RequestError(f"{what}: none of {', '.join(names)} is in {', '.join(map(str, folders))}")
