"""Pictures with phrases and boxes as a source of a store: one pair a phrase and language, boxes beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.annotations import check_id, check_text
from data_tools.errors import DataFault, RequestError
from data_tools.items import ImageItem, Item, Stream, TextItem, fingerprint_of, located
from data_tools.pictures import read_file, read_size
from data_tools.sources.boxes.annotated import Annotated, Form, Notes, Phrase, place_of
from data_tools.sources.boxes.placing import Frame
from data_tools.sources.places import Root
from data_tools.store import Id
from data_tools.store.beside import MOST
from data_tools.words import many

_LISTED = 100  # files by name in what says of a build whether it is still the same; a folder may have one a picture


class BoxesSource:
    """The pictures of one form, each with its phrases.

    Args:
        translations: phrase (in lower case) → the same in Chinese, or any other language: a pair of its own with the same boxes.
        outside: whether names of pictures may lead out of their folder.
    """

    kind = "boxes"

    def __init__(self, form: Form, translations: dict[str, str], names: Path | None, outside: bool = False) -> None:
        self.form, self.translations, self.names, self.outside = form, translations, names, outside

    def open(self) -> Stream:
        if not self.form.root.is_dir():
            raise RequestError(f"{self.form.root}: no such folder of images; name it with --images")
        done, notes = [0], list[str]()
        return Stream(self._items(done, notes), self.form.total, "picture", lambda: done[0], notes)

    def _items(self, done: list[int], said: list[str]) -> Iterator[Item]:
        root, notes, texts = Root(self.form.root, self.outside), Notes(), 0
        untranslated: dict[str, None] = {}
        for found in self.form.pictures(notes):
            done[0] += 1
            if isinstance(found, DataFault):
                yield found
                continue
            if not found.phrases:
                notes.add("bare", found.image)
                continue
            try:
                image, frame = _picture(found, root)
            except DataFault as fault:
                yield located(fault, found.file, found.line, found.image[:500])
                continue
            yield image
            for phrase in found.phrases:
                if not phrase.boxes:
                    notes.add("boxless", place_of(found.file, phrase.line, repr(phrase.texts[0][0])))
                    continue
                boxes: list[list[float]] = []
                faults = _place(found, phrase, frame, boxes, notes)
                yield from faults
                if faults and not boxes:
                    continue
                if len(boxes) > MOST:
                    mend = "Split the phrase, or drop some."
                    problem = f"{len(boxes):,} boxes with {phrase.texts[0][0]!r:.60}; a pair has at most {MOST:,}"
                    yield DataFault(problem, mend=mend, kind="bad-box", file=found.file, line=phrase.line or found.line)
                    continue
                for text, language in self._texts(phrase, untranslated):
                    texts += 1
                    try:
                        text, ids, line = check_text(text).strip(), (image.image_id,), phrase.line or found.line
                        beside: dict[str, Any] | None = {"boxes": boxes} if boxes else None
                        yield TextItem(texts, text, ids, language, found.file, line, image.origin, True, beside)
                    except DataFault as fault:
                        yield located(fault, found.file, phrase.line or found.line, found.image[:500])
        said += [*notes.lines(), *root.notes()]
        if self.names is not None and untranslated:
            shown = ", ".join(map(repr, list(untranslated)[:5]))
            more = " …" if len(untranslated) > 5 else ""
            said.append(
                f"{many(len(untranslated), 'phrase')} without a translation in {self.names.name}: {shown}{more}"
            )

    def _texts(self, phrase: Phrase, untranslated: dict[str, None]) -> Iterator[tuple[str, str | None]]:
        yield from phrase.texts
        if self.names is not None and len(phrase.texts) == 1 and isinstance(phrase.texts[0][0], str):
            text = phrase.texts[0][0]
            translated = self.translations.get(text.strip().casefold())
            if translated is None:
                untranslated.setdefault(text.strip())
            elif translated != text.strip():
                yield translated, None

    def fingerprint(self) -> dict[str, Any]:
        state = fingerprint_of(*self.form.files, *([] if self.names is None else [self.names]))
        return {
            "files": state[:_LISTED],
            "all": hashlib.sha256(json.dumps(state).encode()).hexdigest(),
            "root": str(self.form.root.resolve()),
            "reading": [type(self.form).__name__, self.outside, getattr(self.form, "asked", None)],
        }

    def expected(self) -> dict[str, int]:
        return {}


def _picture(found: Annotated, root: Root) -> tuple[ImageItem, Frame | None]:
    """The picture, and the frame of its boxes; None: it cannot be read, which the build says of it.

    Raises:
        DataFault: a name that is none, or another picture than the boxes are meant for.
    """
    if found.content is not None:
        image_id: Id = check_id(found.image, "the image's name")
        content: bytes | Path = found.content
        data, origin = found.content, None
    else:
        path, image_id = root.find(found.image)
        image_id, content, origin = check_id(image_id, "the image's name"), path, str(path)
        try:
            data = content = read_file(path)
        except DataFault:
            return ImageItem(image_id, path, found.file, found.line, origin, True), None
    item = ImageItem(image_id, content, found.file, found.line, origin, True)
    try:
        width, height, orientation = read_size(data)
    except DataFault:
        return item, None
    return item, Frame.of(width, height, orientation, found.size, found.relative)


def _place(
    found: Annotated, phrase: Phrase, frame: Frame | None, boxes: list[list[float]], notes: Notes
) -> Sequence[DataFault]:
    """Put the phrase's boxes into `boxes`, each once; the faults of those that are none."""
    faults: list[DataFault] = []
    for box in phrase.boxes if frame is not None else ():
        place = place_of(found.file, box.line, box.called)
        try:
            assert frame is not None
            placed = frame.place(box, lambda kind, place=place: notes.add(kind, place))  # type: ignore[misc] # bound now
        except DataFault as fault:
            called = f"{found.image[:400]}, {box.called}" if box.called else found.image[:500]
            faults.append(located(fault, found.file, box.line or phrase.line or found.line, called))
            continue
        if placed in boxes:
            notes.add("twice", place)
        else:
            boxes.append(placed)
    return faults
