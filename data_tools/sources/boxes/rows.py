"""JSONL or a JSON array with a picture, a phrase and its boxes a row: our own form, and what referring expressions (RefCOCO) come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault
from data_tools.items import located
from data_tools.sources.boxes.annotated import CORNERS, SIDES, Annotated, Notes, Phrase, RawBox, size_of
from data_tools.sources.rows import RowFile

IMAGES = ("image", "image_path", "file_name", "filename", "img_name", "image_file", "img_path", "img", "path", "file")
PHRASES = (
    "phrases",
    "phrase",
    "expressions",
    "expression",
    "sentences",
    "sentence",
    "refexp",
    "query",
    "caption",
    "text",
)
BOXES = ("boxes", "bboxes", "box", "bbox")
_INNER = ("raw", "sent", "sentence", "text", "phrase", "expression")  # of an object in a list of sentences
_FORM = '{"image": "a.jpg", "phrase": "…", "boxes": [[x, y, width, height]], "relative": true}'


class Rows:
    """Rows of one picture are brought together, and those of one phrase on it.

    Args:
        box_format: ``xywh`` (upper left corner and sides) or ``xyxy`` (two corners), where a row does not say it itself.
    """

    def __init__(self, file: Path, images: Path | None, box_format: str = SIDES) -> None:
        self.files, self.root, self.asked = [file], images or file.parent, box_format
        self.total = None

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]:
        file, found = self.files[0], dict[str, Annotated]()
        for line, row in RowFile(file).rows():
            if isinstance(row, DataFault):
                yield row
                continue
            try:
                self._take(row, line, found)
            except DataFault as fault:
                yield located(fault, file, line)
        yield from found.values()

    def _take(self, row: dict[str, Any], line: int, found: dict[str, Annotated]) -> None:
        image, said, boxes = (
            _field(row, names, what) for names, what in ((IMAGES, "image"), (PHRASES, "phrase"), (BOXES, "boxes"))
        )
        if not isinstance(image, str) or not image.strip():
            raise _fault(f"the image is {image!r:.60}, not the path of a file")
        relative, form = row.get("relative", False), row.get("box_format", self.asked)
        if type(relative) is not bool:
            raise _fault(f'"relative" is {relative!r:.60}, not true or false')
        if form not in (SIDES, CORNERS):
            raise _fault(f'"box_format" is {form!r:.60}, not "{SIDES}" or "{CORNERS}"')
        texts = _texts(said)
        if not isinstance(boxes, list):
            raise _fault(f"the boxes are {boxes!r:.60}, not a list")
        if len(boxes) == 4 and not any(isinstance(one, (list, tuple, dict)) for one in boxes):
            boxes = [boxes]
        size = size_of(row)
        raw = [RawBox(box, form, line) for box in boxes]
        own = found.setdefault(image, Annotated(image, self.files[0], [], line, size, relative))
        if (own.relative, own.size) != (relative, size):
            raise _fault(f"another row of this picture ({own.line}) has its boxes in other units or another size")
        for one in texts:
            same = next((phrase for phrase in own.phrases if phrase.texts == one), None)
            if same is None:
                own.phrases.append(Phrase(one, list(raw), line))
            else:
                same.boxes += raw


def _field(row: dict[str, Any], names: tuple[str, ...], what: str) -> Any:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise _fault(
            f"there is no {what} ({', '.join(map(repr, list(row)[:6])) or 'nothing'} is there)", "missing-field"
        )
    return row[name]


def _texts(said: Any) -> list[list[tuple[str, str | None]]]:
    """Phrases, each in one language or more: a text, a list of texts or objects, or language → text."""
    if isinstance(said, dict):
        texts = [(text, language if language in ("zh", "en", "mixed") else None) for language, text in said.items()]
        if texts and all(isinstance(text, str) and text.strip() for text, _ in texts):
            return [[(text.strip(), language) for text, language in texts]]
        raise _fault(f"the phrases are {said!r:.60}, not texts by language")
    found: list[list[tuple[str, str | None]]] = []
    for one in said if isinstance(said, list) else [said]:
        if isinstance(one, dict):
            one = next((one[name] for name in _INNER if name in one), None)
        if not isinstance(one, str) or not one.strip():
            raise _fault(f"the phrase is {one!r:.60}, not a text", "bad-text")
        found.append([(one.strip(), None)])
    if not found:
        raise _fault("the list of phrases is empty", "empty-text")
    return found


def _fault(problem: str, kind: str = "bad-field") -> DataFault:
    return DataFault(problem, mend=f"Write {_FORM}.", kind=kind)
