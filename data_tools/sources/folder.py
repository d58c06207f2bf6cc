"""A folder of images with captions: a table in it (`captions.csv` …), `captions.txt`, or a .txt beside each image."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.annotations import check_text
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Source, Stream, TextItem, fingerprint_of, located
from data_tools.sources.caption_lines import read_captions, without_ending
from data_tools.sources.column_names import IMAGE_NAMES, TEXT_NAMES, known_for
from data_tools.sources.options import SourceOptions
from data_tools.sources.places import Root, readable
from data_tools.sources.rows import SUFFIXES
from data_tools.sources.table import TableSource
from data_tools.text_files import AUTO, TextFile, known_encoding
from data_tools.walk import is_picture, walk

_TABLES = ("captions", "metadata")


def open_folder(folder: Path, options: SourceOptions) -> Source:
    """The source a folder of images is: by its captions file, else by the .txt files in it.

    Raises:
        RequestError: no such folder or file, or several captions files to choose from.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder of images")
    captions, outside = options.captions, options.allow_outside
    if captions is None:
        found = [folder / f"{name}{suffix}" for name in _TABLES for suffix in (*SUFFIXES, ".txt")]
        found = [file for file in (*found, *sorted(folder.glob("*.token"))) if file.is_file()]
        if len(found) > 1:
            raise RequestError(
                f"{folder}: which is it, {' or '.join(file.name for file in found)}? Name it with --captions."
            )
        captions = found[0] if found else None
        if captions is not None:
            try:
                Root(folder, outside).check(captions)
            except DataFault as fault:
                raise RequestError(f"{fault} Or name the file with --captions {os.path.realpath(captions)}.") from None
    if captions is None:
        found_as: Source = TextFilesSource(folder, options.encoding, outside)
    elif not captions.is_file():
        raise RequestError(f"{captions}: no such file of captions")
    elif captions.suffix.lower() in SUFFIXES or _is_table(captions, options.encoding):
        form = captions.suffix.lower() if captions.suffix.lower() in SUFFIXES else ".csv"
        return TableSource(
            captions,
            root=folder,
            columns=options.columns,
            encoding=options.encoding,
            header=options.header,
            outside=outside,
            form=form,
        )
    else:
        found_as = CaptionLinesSource(folder, captions, options.encoding, outside)
    if any(vars(options.columns).values()) or not options.header:
        flag = "--…-column" if options.header else "--no-header"
        raise RequestError(f"{flag} is for tables, and {captions or folder} is none; leave it out")
    return found_as


def _is_table(file: Path, encoding: str) -> bool:
    """``image,caption`` as first line of a .txt: a CSV of another name (Flickr8k as Kaggle has it)."""
    with TextFile(file, encoding) as text:
        first = next((line for _, line in text.lines()), "")
    names = [] if isinstance(first, DataFault) else re.split("[,|\t]", first)
    return all(any(known_for(name, usual) for name in names) for usual in (IMAGE_NAMES, TEXT_NAMES))


class TextFilesSource:
    """``photo.jpg`` and ``photo.txt`` (or ``photo.jpg.txt``): every non-blank line is a caption.

    Ids are the paths below `folder`. A ``photo.txt`` beside ``photo.jpg`` and ``photo.png`` speaks of both, which is said;
    ``photo.png.txt`` speaks of one.
    """

    kind = "folder"

    def __init__(self, folder: Path, encoding: str = AUTO, outside: bool = False) -> None:
        self.folder, self.encoding, self.outside = folder, encoding, outside

    def open(self) -> Stream:
        found = walk(self.folder, outside=self.outside)
        images = found.names()
        if not images:
            raise found.nothing()
        if not any(file.is_file() for name in images for file in self._beside(name)):
            raise RequestError(
                f"{readable(str(self.folder))}: no captions. Put captions.csv (columns image, text), .tsv, .jsonl or .parquet "
                "there, a .txt beside each image, or name a file with --captions."
            )
        if self.encoding != AUTO:
            known_encoding(self.encoding)
        done, notes = [0], found.lines((".txt",))
        return Stream(self._items(images, done, notes), len(images), "image", lambda: done[0], notes)

    def _beside(self, name: str) -> tuple[Path, Path]:
        path = self.folder / name
        return path.with_name(f"{path.name}.txt"), path.with_suffix(".txt")

    def _several(self, images: list[str]) -> list[Path]:
        """Files of captions that stand beside more than one image."""
        count = Counter(shared for own, shared in map(self._beside, images) if not own.is_file())
        return [file for file, images_of_it in count.items() if images_of_it > 1 and file.is_file()]

    def _items(self, images: list[str], done: list[int], notes: list[str]) -> Iterator[Item]:
        root, several = Root(self.folder, self.outside), self._several(images)
        if several:
            example = readable(str(next(iter(several)).relative_to(self.folder)))
            notes.append(
                f"{len(several):,} .txt beside several images of that name ({example}): the texts stand on each of them; "
                "to tell them apart, call the captions of one NAME.png.txt"
            )
        text_number, encodings = 0, Counter[str]()
        for name in images:
            done[0] += 1
            image_id, path = readable(name), self.folder / name
            own, shared = self._beside(name)
            captions = own if own.is_file() else shared
            try:
                if not captions.is_file():
                    raise DataFault(
                        f"image {image_id} has no {readable(captions.name)} beside it",
                        kind="missing-caption",
                        mend="Write one, or move the image away.",
                    )
                root.check(captions)
            except DataFault as fault:
                yield located(fault, path, None, image_id)
                continue
            yield ImageItem(image_id, path, path, None, name, True)
            written = 0
            try:
                with TextFile(captions, self.encoding) as text:
                    encodings[text.read_as] += 1
                    for number, line in text.lines():
                        text_number += 1
                        written += 1
                        try:
                            if isinstance(line, DataFault):
                                raise line
                            text_item = check_text(line.strip())
                            yield TextItem(text_number, text_item, (image_id,), None, captions, number, name, True)
                        except DataFault as fault:
                            yield located(fault, captions, number, image_id)
            except (RequestError, OSError) as error:  # it went away, may not be read, or is UTF-16
                yield DataFault(
                    f"the captions cannot be read ({readable(str(error))})",
                    kind="unreadable-captions",
                    mend="Mend or drop that file.",
                    file=captions,
                    item_id=image_id,
                )
                continue
            if not written:
                yield DataFault(
                    "the caption file is empty",
                    mend="Write a caption a line.",
                    kind="empty-text",
                    file=captions,
                    item_id=image_id,
                )
        notes += [
            f"{count:,} .txt {'is' if count == 1 else 'are'} {encoding}" for encoding, count in encodings.most_common()
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder.resolve()),
            "files": walk(self.folder, outside=self.outside).totals,
            "reading": [self.encoding, self.outside],
        }

    def expected(self) -> dict[str, int]:
        return {}


class CaptionLinesSource:
    """``captions.txt`` with lines ``photo.jpg<TAB>caption`` or ``photo.jpg#0 caption``; images below `folder`.

    A name without ending means the one image that has it before its ending.
    """

    kind = "folder-lines"

    def __init__(self, folder: Path, captions: Path, encoding: str = AUTO, outside: bool = False) -> None:
        self.folder, self.captions, self.encoding, self.outside = folder, captions, encoding, outside

    def open(self) -> Stream:
        found = walk(self.folder, outside=self.outside)
        names = {readable(name): name for name in found.names()}
        with TextFile(self.captions, self.encoding) as text:
            total, encoding, read_as = sum(1 for _ in text.lines()), text.found, text.read_as
        found.is_read(self.captions)
        done, notes = [0], found.lines()
        notes.append(f"{self.captions.name} is {read_as}")
        return Stream(self._items(names, encoding, done, notes), total, "caption", lambda: done[0], notes)

    def _items(self, names: dict[str, str], encoding: str, done: list[int], notes: list[str]) -> Iterator[Item]:
        root = Root(self.folder, self.outside)
        stems: dict[str, list[str]] = {}
        for name in names:
            stems.setdefault(without_ending(name), []).append(name)
        for number, line in enumerate(read_captions(self.captions, encoding=encoding), start=1):
            done[0] += 1
            if isinstance(line, DataFault):
                yield line
                continue
            try:
                path, image_id = self._find(line.name, names, stems, root)
            except DataFault as fault:
                yield located(fault, self.captions, line.line, line.name[:500])
                continue
            yield ImageItem(image_id, path, self.captions, line.line, str(path), True)
            yield TextItem(number, line.text, (image_id,), None, self.captions, line.line, str(path), True)
        notes += root.notes()

    def _find(self, written: str, names: dict[str, str], stems: dict[str, list[str]], root: Root) -> tuple[Path, str]:
        path, image_id = root.find(written)
        if image_id in names:
            return self.folder / names[image_id], image_id
        if is_picture(image_id) or image_id.startswith(("/", "../")):
            if path.is_file():  # outside, or hidden
                return path, image_id
            same = [name for name in stems.get(without_ending(image_id), ()) if name != image_id]
            there = f"; {', '.join(same[:3])} is" if same else ""
            raise DataFault(
                f"image {image_id!r} is not in {self.folder}{there}",
                mend="Put it there or correct the line.",
                kind="missing-file",
            )
        found = stems.get(image_id, [])
        if len(found) == 1:
            return self.folder / names[found[0]], found[0]
        if found:
            raise DataFault(
                f"{image_id!r} may be {' or '.join(found[:4])}",
                mend="Write the name with its ending.",
                kind="ambiguous-name",
            )
        raise DataFault(
            f"no image {image_id!r} is in {self.folder}", mend="Put it there or drop the line.", kind="missing-file"
        )

    def fingerprint(self) -> dict[str, Any]:
        return {
            "files": fingerprint_of(self.captions),
            "folder": str(self.folder.resolve()),
            "reading": [self.encoding, self.outside],
        }

    def expected(self) -> dict[str, int]:
        return {}
