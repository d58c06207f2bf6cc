"""A folder of images with captions: a table in it (`captions.csv` …), `captions.txt`, or a .txt beside each image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import check_text, decode_line, read_lines
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Source, Stream, TextItem, fingerprint_of, located
from data_tools.sources.caption_lines import read_captions
from data_tools.sources.rows import SUFFIXES
from data_tools.sources.table import Columns, TableSource
from data_tools.walk import walk

_TABLES = ("captions", "metadata")


def open_folder(
    folder: Path, *, captions: Path | None = None, columns: Columns | None = None, encoding: str = "utf-8"
) -> Source:
    """The source a folder of images is: by its captions file, else by the .txt files in it.

    Raises:
        RequestError: no such folder or file, or several captions files to choose from.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of images")
    if captions is None:
        found = [folder / f"{name}{suffix}" for name in _TABLES for suffix in (*SUFFIXES, ".txt")]
        found = [file for file in found if file.is_file()]
        if len(found) > 1:
            raise RequestError(
                f"{folder}: which is it, {' or '.join(file.name for file in found)}? Name it with --captions."
            )
        captions = found[0] if found else None
    if captions is None:
        return TextFilesSource(folder)
    if not captions.is_file():
        raise RequestError(f"{captions}: no such file of captions")
    if captions.suffix.lower() == ".txt":
        return CaptionLinesSource(folder, captions)
    return TableSource(captions, root=folder, columns=columns, encoding=encoding)


class TextFilesSource:
    """``photo.jpg`` and ``photo.txt``: every non-blank line of the .txt is a caption. Ids are the paths below `folder`."""

    kind = "folder"

    def __init__(self, folder: Path, outside: bool = False) -> None:
        self.folder, self.outside = folder, outside

    def open(self) -> Stream:
        found = walk(self.folder, outside=self.outside)
        images = found.names()
        if not images:
            raise found.nothing()
        if not any((self.folder / name).with_suffix(".txt").is_file() for name in images):
            raise RequestError(
                f"{self.folder}: no captions. Put captions.csv (columns image, text), .tsv, .jsonl or .parquet there, a .txt beside "
                "each image, or name a file with --captions."
            )
        done = [0]
        return Stream(
            self._items(images, done),
            total=len(images),
            unit="image",
            tell=lambda: done[0],
            notes=found.lines((".txt",)),
        )

    def _items(self, images: list[str], done: list[int]) -> Iterator[Item]:
        text_number = 0
        for image_id in images:
            done[0] += 1
            path = self.folder / image_id
            captions = path.with_suffix(".txt")
            if not captions.is_file():
                yield DataFault(f"image {image_id} has no {captions.name} beside it", mend="Write one, or move the image away.",
                                kind="missing-caption", file=path, item_id=image_id)  # fmt: skip
                continue
            yield ImageItem(image_id, path, path)
            written = 0
            with captions.open("rb") as handle:
                for number, line in read_lines(handle, captions):
                    text_number += 1
                    written += 1
                    try:
                        if isinstance(line, DataFault):
                            raise line
                        yield TextItem(
                            text_number, check_text(decode_line(line).strip()), (image_id,), None, captions, number
                        )
                    except DataFault as fault:
                        yield located(fault, captions, number, image_id)
            if not written:
                yield DataFault("the caption file is empty", mend="Write a caption a line.", kind="empty-text", file=captions,
                                item_id=image_id)  # fmt: skip

    def fingerprint(self) -> dict[str, Any]:
        return {"folder": str(self.folder.resolve()), "files": walk(self.folder, outside=self.outside).totals}

    def expected(self) -> dict[str, int]:
        return {}


class CaptionLinesSource:
    """``captions.txt`` with lines ``photo.jpg<TAB>caption`` or ``photo.jpg#0 caption``; images below `folder`."""

    kind = "folder-lines"

    def __init__(self, folder: Path, captions: Path, outside: bool = False) -> None:
        self.folder, self.captions, self.outside = folder, captions, outside

    def open(self) -> Stream:
        found = walk(self.folder, outside=self.outside)
        files = {name.rpartition(".")[0]: name for name in found.names()}
        if not files:
            raise found.nothing()
        done = [0]
        with self.captions.open("rb") as handle:
            total = sum(1 for _ in handle)
        notes = found.lines((".txt",))
        return Stream(self._items(files, done), total=total, unit="caption", tell=lambda: done[0], notes=notes)

    def _items(self, files: dict[str, str], done: list[int]) -> Iterator[Item]:
        for number, line in enumerate(read_captions(self.captions), start=1):
            done[0] += 1
            if isinstance(line, DataFault):
                yield line
                continue
            name = files.get(line.image)
            if name is None:
                yield DataFault(f"image {line.image!r} is not in {self.folder}", mend="Put it there or drop the line.",
                                kind="missing-file", file=self.captions, line=line.line, item_id=line.image)  # fmt: skip
                continue
            yield ImageItem(name, self.folder / name, self.captions, line.line, origin=name)
            yield TextItem(number, line.text, (name,), None, self.captions, line.line)

    def fingerprint(self) -> dict[str, Any]:
        return {"files": fingerprint_of(self.captions), "folder": str(self.folder.resolve())}

    def expected(self) -> dict[str, int]:
        return {}
