"""Text lines in, records out: every line is either accepted or a fault with file, line, problem and mend.

Formats of the official code: ``{split}_imgs.tsv`` (image id, tab, base64 of the file) and ``{split}_texts.jsonl``
(``{"text_id", "text", "image_ids"}``, ``image_ids`` empty where unknown; an optional ``"language"`` is ours).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault, RequestError

Id = int | str
_LARGEST = 2**63


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One text and the images it is known to fit."""

    text_id: Id
    text: str
    image_ids: tuple[Id, ...]
    language: str | None
    line: int


def detect_language(text: str) -> str | None:
    """``zh``, ``en`` or ``mixed`` by script; None where there is neither a Han character nor a Latin letter."""
    han = any("\u3400" <= c <= "\u9fff" or "\U00020000" <= c <= "\U0003ffff" for c in text)
    latin = any(c.isascii() and c.isalpha() for c in text)
    return "mixed" if han and latin else "zh" if han else "en" if latin else None


def read_lines(path: Path) -> Iterator[tuple[int, str | DataFault]]:
    """(number, line) of a UTF-8 text file, BOM and CRLF taken off; a line that is not UTF-8 is a fault.

    Raises:
        RequestError: the file is not there or cannot be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; opening apart keeps its errors apart
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}. Check the path.") from None
    with file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, DataFault(
                    f"the line is not UTF-8 (byte {error.start + 1})", kind="not-utf8", file=path, line=number,
                    mend="Convert the file to UTF-8; Windows tools often write GBK.",
                )  # fmt: skip


def as_id(value: Any) -> Id | None:
    """An id as given; None where it is none (a float, a bool, an empty text, a number beyond 63 bits)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if -_LARGEST <= value < _LARGEST else None
    return value if isinstance(value, str) and value and value.isprintable() else None


def parse_text_line(line: str, path: Path, number: int) -> TextRecord:
    """One line of a texts file.

    Raises:
        DataFault: naming file, line and field.
    """

    def fault(problem: str, mend: str, kind: str) -> DataFault:
        return DataFault(problem, mend=mend, kind=kind, file=path, line=number)

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = str(error).split(":")[0]
        raise fault(f"not valid JSON ({said})", "Write one JSON object a line.", "bad-json") from None
    if not isinstance(record, dict):
        raise fault(f"a {type(record).__name__} instead of an object", 'Write {"text_id", "text", "image_ids"}.', "bad-json")
    for field in ("text_id", "text", "image_ids"):
        if field not in record:
            found = ", ".join(map(str, list(record)[:5])) or "nothing"
            raise fault(f"field {field!r} is missing (found: {found})", f"Add {field!r} to the line.", "missing-field")
    text_id, text, image_ids = as_id(record["text_id"]), record["text"], record["image_ids"]
    if text_id is None:
        raise fault(f"text_id is {record['text_id']!r}", "Use a whole number or a text.", "bad-id")
    if not isinstance(text, str) or not text.strip():
        raise fault(f"text is {text!r}", "Write a text that is not empty.", "bad-text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise fault("the text holds half a character (a lone surrogate)", "Export it again as UTF-8.", "bad-text") from None
    if not isinstance(image_ids, list):
        raise fault(f"image_ids is {image_ids!r}", "Write a list, empty where unknown.", "bad-id")
    ids = tuple(as_id(image_id) for image_id in image_ids)
    if None in ids:
        raise fault(f"image_ids holds {image_ids[ids.index(None)]!r}", "Use whole numbers or texts.", "bad-id")
    language = record.get("language")
    if language is not None and not isinstance(language, str):
        raise fault(f"language is {language!r}", 'Write "zh", "en" or "mixed", or leave it out.', "bad-text")
    return TextRecord(text_id, text, tuple(dict.fromkeys(ids)), language or detect_language(text), number)


def parse_image_line(line: str, path: Path, number: int) -> tuple[Id, bytes]:
    """One line of an images file → (image id, encoded image file).

    Raises:
        DataFault: naming file, line and id.
    """
    name, tab, encoded = line.partition("\t")
    if not tab or not name.strip():
        raise DataFault("no id, tab, base64", mend="Write the image id, a tab, and the file in base64.", kind="bad-line",
                        file=path, line=number)  # fmt: skip
    image_id: Id = int(name) if name.isascii() and name.isdecimal() and len(name) < 19 else name.strip()
    try:
        # The URL-safe alphabet, which the official scripts use, and the ordinary one.
        data = base64.b64decode(encoded.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataFault(f"image {image_id!r} is not base64 ({error})", mend="Encode the image file again.",
                        kind="bad-base64", file=path, line=number, item_id=image_id) from None  # fmt: skip
    return image_id, data
