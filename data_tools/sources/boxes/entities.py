"""Flickr30k Entities: ``Sentences/ID.txt`` with ``[/EN#283585/people Two young guys]``, ``Annotations/ID.xml`` with the boxes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from data_tools.errors import DataFault, RequestError
from data_tools.items import located
from data_tools.regular import regular
from data_tools.sources.boxes.annotated import CORNERS, Annotated, Notes, Phrase, RawBox, size_of
from data_tools.text_files import TextFile
from data_tools.walk import natural

SENTENCES, ANNOTATIONS = "Sentences", "Annotations"
_MARKED = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+) ([^\[\]]+)\]")
_SPLITS = {"train": "train.txt", "valid": "val.txt", "test": "test.txt"}
_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
_LARGEST = 16 * 2**20  # bytes of an annotation


class Entities:
    """Phrases are the marked ones of a picture's five sentences; the same words on several entities have the boxes of all."""

    def __init__(self, folder: Path, images: Path | None, ids: list[str]) -> None:
        self._folder, self._ids, self.total = folder, ids, len(ids)
        self.root = images or next((folder / name for name in _FOLDERS if os.path.isdir(folder / name)), folder)
        places = [(folder / SENTENCES / f"{one}.txt", folder / ANNOTATIONS / f"{one}.xml") for one in ids]
        self.files = [file for pair in places for file in pair if os.path.isfile(file)]

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]:
        for one in self._ids:
            sentences, annotations = self._folder / SENTENCES / f"{one}.txt", self._folder / ANNOTATIONS / f"{one}.xml"
            try:
                boxes, size = _read_boxes(annotations)
                if not os.path.isfile(sentences):
                    raise DataFault(
                        "there is no such file", mend="Take the sentences of the same release.", kind="missing-file"
                    )
            except DataFault as fault:
                yield located(fault, sentences)
                continue
            phrases: dict[str, tuple[Phrase, set[str]]] = {}
            with TextFile(sentences) as text:
                for line, content in text.lines():
                    if isinstance(content, DataFault):
                        yield located(content, sentences, line)
                        continue
                    marks = _MARKED.findall(content)
                    if len(marks) != content.count("[/EN#") or not marks and "[" in content:
                        mend = "A phrase is marked like [/EN#283585/people Two young guys]."
                        yield DataFault(
                            f"a mark is not closed: {content!r:.80}",
                            mend=mend,
                            kind="bad-annotation",
                            file=sentences,
                            line=line,
                        )
                    for entity, _, said in marks:
                        phrase, known = phrases.setdefault(said.strip(), (Phrase([(said.strip(), "en")], []), set()))
                        if entity not in known:
                            known.add(entity)
                            phrase.boxes += boxes.get(entity, [])
            yield Annotated(f"{one}.jpg", annotations, [phrase for phrase, _ in phrases.values()], size=size)


def _read_boxes(file: Path) -> tuple[dict[str, list[RawBox]], tuple[float, float] | None]:
    """Entity → boxes, and the size they are meant in. Pixels count from 1 there, corners are in the box.

    Raises:
        DataFault: it is missing, or no such XML.
    """
    if not os.path.isfile(file):
        raise DataFault(
            "there is no such file",
            mend="Take the annotations of the same release.",
            kind="missing-annotation",
            file=file,
        )
    regular(file, _LARGEST)
    data = file.read_bytes()
    mend = "Take it again from the release."
    if b"<!" in data:  # entities of its own can make a small file a large one
        raise DataFault("it declares a document type", mend=mend, kind="bad-xml", file=file)
    try:
        tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataFault(f"it is no XML that can be read ({error})", mend=mend, kind="bad-xml", file=file) from None
    found: dict[str, list[RawBox]] = {}
    for number, thing in enumerate(tree.iter("object"), start=1):
        names = [name.text.strip() for name in thing.findall("name") if name.text]
        for place in thing.findall("bndbox"):
            corners = [_number(place.findtext(corner)) for corner in ("xmin", "ymin", "xmax", "ymax")]
            box = RawBox(
                [one - 1 if isinstance(one, float) else one for one in corners], CORNERS, called=f"object {number}"
            )
            for name in names:
                found.setdefault(name, []).append(box)
    return found, size_of({side: _number(tree.findtext(f"size/{side}")) for side in ("width", "height")})


def _number(text: str | None) -> float | str | None:
    """What is no number stays as it is and becomes the fault of its box."""
    try:
        return float(text or "")
    except ValueError:
        return text


def open_entities(folder: Path, images: Path | None) -> dict[str, Entities]:
    """The splits whose lists (``train.txt``, ``val.txt``, ``test.txt``) lie in the folder; one without a name where none does.

    Raises:
        RequestError: there are no sentences.
    """
    there = sorted((file.stem for file in (folder / SENTENCES).glob("*.txt")), key=natural)
    if not there:
        raise RequestError(f"{folder / SENTENCES}: no .txt in it; unpack the sentences of Flickr30k Entities there")
    splits: dict[str, Entities] = {}
    for name, listed in _SPLITS.items():
        if os.path.isfile(folder / listed):
            with TextFile(folder / listed) as text:
                ids = [line.strip() for _, line in text.lines() if isinstance(line, str)]
            if odd := next((one for one in ids if not one.isalnum()), None):
                raise RequestError(
                    f"{folder / listed}: {odd!r:.60} is no id of a picture; a line is one, like 1000092795"
                )
            splits[name] = Entities(folder, images, ids)
    return splits or {"": Entities(folder, images, there)}
