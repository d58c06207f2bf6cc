"""The official source files, line by line: `{split}_imgs.tsv` and `{split}_texts.jsonl`. A bad line becomes a fault.

Every non-blank line gives exactly one item, an image, a text or a fault: nothing is lost in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.errors import DataFault
from data_tools.items import Base64, ImageItem, TextItem, located
from data_tools.language import read_language
from data_tools.store import Id
from data_tools.store.layouts import LONGEST_ID, canonical_id, is_id, is_text
from data_tools.text_files import decode_line, read_lines

_SHOWN = 60
_MOST_DIGITS = 1000  # of a number in JSON; reading one takes time with the square of its length


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise ValueError(f"field {twice[:_SHOWN]!r} stands twice")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_once)  # faster: it reads numbers itself
_wary = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_once)


def parse_json(line: bytes | str) -> Any:
    """One line of JSON.

    Raises:
        DataFault: not UTF-8, not JSON, a field twice, or nested or numbered beyond reason.
    """
    text = decode_line(line) if isinstance(line, bytes) else line
    try:
        return (_decoder if len(text) <= _MOST_DIGITS else _wary).decode(text)
    except (ValueError, RecursionError) as error:
        where = (
            f"column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else str(error).split(";")[0]
        )
        raise DataFault(
            f"broken JSON ({where}): {text[:_SHOWN]!r}",
            mend='A line is one object, like {"text_id": 1, …}.',
            kind="bad-json",
        ) from None


def check_id(value: object, name: str) -> Id:
    """A 64-bit whole number or a word of at most 500 bytes.

    Raises:
        DataFault: anything else.
    """
    if not is_id(value):
        shown = f"{str(value)[:_SHOWN]!r} ({type(value).__name__})" if type(value) is not int else "beyond 64 bits"
        raise DataFault(
            f"{name} is {shown}",
            mend=f"An id is a whole number of 64 bits or a text of 1 to {LONGEST_ID} bytes.",
            kind="bad-id",
        )
    return value


def check_text(value: object) -> str:
    """A caption: not empty, whole characters, no NUL.

    Raises:
        DataFault: anything else.
    """
    if value is None:
        raise DataFault("there is no text (null)", mend="Write a caption or drop the line.", kind="empty-text")
    if not isinstance(value, str):
        raise DataFault(f"text is {type(value).__name__}, not a string", mend='Write "text": "…".', kind="bad-text")
    if not value.strip():
        raise DataFault("the text is empty", mend="Write a caption or drop the line.", kind="empty-text")
    if not is_text(value):
        raise DataFault(
            "the text holds half a character (a lone surrogate)",
            mend="Export the file again as UTF-8.",
            kind="bad-text",
        )
    if "\0" in value:
        raise DataFault("the text holds a NUL character", mend="Export the file again as UTF-8.", kind="bad-text")
    return value


def parse_image(line: bytes) -> tuple[Id, Base64]:
    """``image_id<TAB>base64``.

    Raises:
        DataFault: no tab, no id, no image.
    """
    name, tab, data = line.partition(b"\t")
    if not tab:
        raise DataFault(
            f"no tab between image id and base64: {line[:_SHOWN]!r}",
            mend="A line is image_id<TAB>base64.",
            kind="bad-tsv",
        )
    image_id = check_id(canonical_id(decode_line(name).strip()), "image id")
    data = data.strip()
    if not data:
        raise DataFault(
            "no image behind the tab",
            mend="Put the base64 of the image file there.",
            kind="bad-base64",
            item_id=image_id,
        )
    return image_id, Base64(data)


def parse_text(line: bytes) -> TextItem:
    """``{"text_id": …, "text": …, "image_ids": […]}``, optionally ``"language"``.

    Raises:
        DataFault: broken JSON, a missing or wrong field.
    """
    row = parse_json(line)
    if not isinstance(row, dict):
        raise DataFault(
            f"the line is {type(row).__name__}, not an object", mend='Write {"text_id": …}.', kind="bad-json"
        )
    for name in ("text_id", "text", "image_ids"):
        if name not in row:
            raise DataFault(
                f"field {name!r} is missing (found: {', '.join(map(repr, list(row)[:8])) or 'none'})",
                mend='A line has "text_id", "text" and "image_ids" ([] where unknown).',
                kind="missing-field",
            )
    text_id = check_id(row["text_id"], "text_id")
    try:
        text, image_ids = check_text(row["text"]), row["image_ids"]
        if not isinstance(image_ids, list):
            raise DataFault(
                f"image_ids is {type(image_ids).__name__}, not a list",
                mend='Write "image_ids": [1, 2], or [].',
                kind="bad-field",
            )
        image_ids = [check_id(image_id, "an image id") for image_id in image_ids]
        if len(set(image_ids)) < len(image_ids):
            raise DataFault("image_ids names an image twice", mend="Name each once.", kind="bad-field")
        return TextItem(text_id, text, image_ids, read_language(row.get("language")))
    except DataFault as fault:
        fault.item_id = text_id
        raise


def read_images(handle: BinaryIO, file: Path) -> Iterator[ImageItem | DataFault]:
    """The images of an opened `{split}_imgs.tsv`."""
    for number, line in read_lines(handle):
        if isinstance(line, DataFault):
            yield located(line, file, number)
            continue
        try:
            image_id, content = parse_image(line)
        except DataFault as fault:
            yield located(fault, file, number)
        else:
            yield ImageItem(image_id, content, file, number)


def read_texts(handle: BinaryIO, file: Path) -> Iterator[TextItem | DataFault]:
    """The texts of an opened `{split}_texts.jsonl`."""
    for number, line in read_lines(handle):
        if isinstance(line, DataFault):
            yield located(line, file, number)
            continue
        try:
            item = parse_text(line)
        except DataFault as fault:
            yield located(fault, file, number)
        else:
            item.file, item.line = file, number
            yield item
