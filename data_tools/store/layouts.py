"""The two ways a pair and a picture lie in LMDB: our layout and the official one (docs/store-format.md).

Both keep a ``meta`` record among the pairs. The official readers fetch pairs by number and never list them, so it is
invisible there; among the images they list every key, so nothing is added.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import struct
from json.scanner import make_scanner
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from data_tools.errors import DataFault
from data_tools.plain_pickle import PlainUnpickler, ordinary_triple
from data_tools.store.pages import MEND

FORMAT, VERSION, WITH_BESIDE = "cnclip-ft-store", 1, 2  # 2: where a pair has something beside its text
META, LONE, PROGRESS, BESIDE = b"meta", b"lone", b"progress", b"beside"
LONGEST_ID = 500  # bytes; LMDB's keys end at 511
Id = int | str
Value = str | int | float | bool  # of a column kept with an image
COLUMNS = "columns"  # the folder of kept columns
_INT64 = 2**63
_ID_TYPES = (int, str)
_NUMBER = struct.Struct(">Q")
_scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type] # declared wrongly; `json.loads` without looking for the encoding first
_quoted = json.encoder.encode_basestring  # a JSON string as it is written, not escaped to ASCII


def json_pair(image_id: Id | None, text_id: Id, text: str) -> str:
    """``1,"a","text"``: a JSON array without its brackets; ten times as fast as `json.dumps`, and these are millions."""
    image = image_id if isinstance(image_id, int) else "null" if image_id is None else _quoted(image_id)
    return f"{image},{text_id if isinstance(text_id, int) else _quoted(text_id)},{_quoted(text)}"


def is_id(value: object) -> TypeGuard[Id]:
    """Whole numbers of 64 bits and strings of 1 to 500 bytes that are text (no half characters) are ids."""
    if type(value) is int:
        return -_INT64 <= value < _INT64
    if type(value) is not str or not value:
        return False
    return is_text(value) and (len(value) * 4 <= LONGEST_ID or len(value.encode()) <= LONGEST_ID)


def is_text(value: str) -> bool:
    """Whether `value` can be written as UTF-8: a lone surrogate (half an emoji) cannot."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def id_key(item_id: Id) -> bytes:
    """``i`` + 8 bytes for a number (in numeric order), ``s`` + UTF-8 for a string: 7 and ``"7"`` differ."""
    if isinstance(item_id, int):
        return b"i" + _NUMBER.pack(item_id + _INT64)
    return b"s" + item_id.encode("utf-8")


def key_id(key: bytes) -> Id:
    """The id a key was made of.

    Raises:
        ValueError: it was made of none.
    """
    if key[:1] not in (b"i", b"s") or len(key) < 2 or (key[:1] == b"i" and len(key) != 9):
        raise ValueError(bytes(key))
    return _NUMBER.unpack(key[1:])[0] - _INT64 if key[:1] == b"i" else bytes(key[1:]).decode("utf-8")


def is_pair(fields: Any) -> bool:
    """Whether it is ``[image_id, text_id, text, language]`` as we write it; the ids' kinds alone, not their lengths."""
    return (
        type(fields) is list
        and len(fields) == 4
        and type(fields[2]) is str
        and type(fields[0]) in _ID_TYPES
        and type(fields[1]) in _ID_TYPES
        and (fields[3] is None or type(fields[3]) is str)
    )


def _parsed(value: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def lone_text(value: bytes, number: int, file: Path) -> tuple[Id, str, str | None]:
    """A record of a text without image as (text_id, text, language).

    Raises:
        DataFault: it is none.
    """
    found = _parsed(value)
    if type(found) is not list or not is_pair([0, *found]):
        raise damaged_value(f"text {number} without image is not [text_id, text, language] in JSON", file, number)
    return tuple(found)


def read_columns(value: bytes, image_id: Id, file: Path) -> dict[str, Value]:
    """A record of kept columns: name → value.

    Raises:
        DataFault: it is none.
    """
    found = _parsed(value)
    if type(found) is not dict or not all(type(one) in (str, int, float, bool) for one in found.values()):
        raise damaged_value(f"the columns of image {image_id!r} are no object of plain values in JSON", file, image_id)
    return found


class Layout(Protocol):
    """How keys and values look; chosen once, in `layout_of` or by the writer's user."""

    name: str
    pair_count_key: bytes | None
    image_count_key: bytes | None

    def pair_key(self, index: int) -> bytes: ...

    def image_key(self, image_id: Id) -> bytes: ...

    def image_id(self, key: bytes) -> Id: ...

    def write_pair(self, image_id: Id, text_id: Id, text: str, language: str | None) -> bytes: ...

    def read_pair(self, value: bytes, index: int, file: Path) -> list[Any] | tuple[Any, ...]: ...

    def write_image(self, data: bytes) -> bytes: ...

    def read_image(self, value: memoryview, image_id: Id, file: Path) -> bytes | memoryview: ...


class PlainLayout(Layout):
    """Ours: pairs as JSON arrays under 8-byte numbers, pictures as they came under their typed ids."""

    name = "plain"
    pair_count_key = image_count_key = None

    def pair_key(self, index: int) -> bytes:
        return _NUMBER.pack(index)

    def image_key(self, image_id: Id) -> bytes:
        return id_key(image_id)

    def image_id(self, key: bytes) -> Id:
        return key_id(key)

    def write_pair(self, image_id: Id, text_id: Id, text: str, language: str | None) -> bytes:
        known = f'"{language}"' if language else "null"
        return f"[{json_pair(image_id, text_id, text)},{known}]".encode()

    def read_pair(self, value: bytes, index: int, file: Path) -> list[Any]:
        try:
            text = value.decode("utf-8")
            found, end = _scan(text, 0)
        except (ValueError, StopIteration, RecursionError):
            raise damaged_value(f"pair {index} is not JSON in UTF-8", file, index) from None
        if end != len(text) or not is_pair(found):
            raise damaged_value(f"pair {index} is not [image_id, text_id, text, language]", file, index)
        return found

    def write_image(self, data: bytes) -> bytes:
        return data

    def read_image(self, value: memoryview, image_id: Id, file: Path) -> memoryview:
        return value


class OfficialLayout(Layout):
    """That of cn_clip 1.6.0: pickled (image_id, text_id, text) under decimal numbers, base64 pictures under decimal ids."""

    name = "official"
    pair_count_key, image_count_key = b"num_samples", b"num_images"

    def pair_key(self, index: int) -> bytes:
        return b"%d" % index

    def image_key(self, image_id: Id) -> bytes:
        return str(image_id).encode("utf-8", "replace")

    def image_id(self, key: bytes) -> Id:
        name = bytes(key).decode("utf-8", "replace")
        return canonical_id(name)

    def write_pair(self, image_id: Id, text_id: Id, text: str, language: str | None) -> bytes:
        return pickle.dumps((image_id, text_id, text), protocol=4)

    def read_pair(self, value: bytes, index: int, file: Path) -> tuple[Any, ...]:
        return ordinary_triple(value) or unpickle_pair(value, str(index), file)

    def write_image(self, data: bytes) -> bytes:
        return _encode_url_safe(data)

    def read_image(self, value: memoryview, image_id: Id, file: Path) -> bytes:
        try:
            return decode_base64(value)
        except binascii.Error as error:
            raise damaged_value(f"image {image_id!r} is not base64 ({error})", file, image_id) from None


PLAIN, OFFICIAL = PlainLayout(), OfficialLayout()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PLAIN, OFFICIAL)}


def canonical_id(name: str) -> Id:
    """``"7"`` is the number 7, as in the official files; ``"007"``, ``"7a"`` and beyond 64 bits stay words."""
    if name.isascii() and len(name) < 20 and name.removeprefix("-").isdigit():
        number = int(name)
        if str(number) == name and is_id(number):
            return number
    return name


def decode_base64(data: bytes | memoryview) -> bytes:
    """Both alphabets, the ordinary and the URL-safe one, as the official readers take them.

    Raises:
        binascii.Error: a character of neither, or a wrong length.
    """
    data = bytes(data)
    if b"-" in data or b"_" in data:
        data = data.translate(_URL_SAFE)
    return _strict_decode(data)


def _strict_decode_slowly(data: bytes) -> bytes:
    """With the standard library alone, at a thirtieth of the speed."""
    decoded = binascii.a2b_base64(data)
    # The decoder drops foreign characters silently; the length tells. (Its strict mode is younger than Python 3.10.)
    if len(data) % 4 or len(decoded) != len(data) // 4 * 3 - data[-2:].count(b"="):
        raise binascii.Error("characters that base64 does not have, or a part is missing")
    return decoded


try:
    import pybase64
except ImportError:
    _strict_decode, _encode_url_safe = _strict_decode_slowly, base64.urlsafe_b64encode
else:
    _encode_url_safe = pybase64.urlsafe_b64encode

    def _strict_decode(data: bytes) -> bytes:
        return pybase64.b64decode(data, validate=True)


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def unpickle_pair(value: bytes, key: str, file: Path) -> tuple[Id, Id, str]:
    """A pickled pair as (image_id, text_id, text).

    Raises:
        DataFault: it holds anything but a tuple of int and str; nothing of it was executed.
    """
    try:
        found = PlainUnpickler(io.BytesIO(value), most_bytes=len(value)).load()
    except Exception as error:  # noqa: BLE001 - damaged pickles fail in many ways
        problem = f"the pickle under key {key} is refused: {error}"
    else:
        if (
            isinstance(found, tuple)
            and len(found) == 3
            and isinstance(found[2], str)
            and all(is_id(part) for part in found[:2])
        ):
            return found
        problem = (
            f"the pickle under key {key} is refused: it holds {type(found).__name__}, not (image_id, text_id, text)"
        )
    raise DataFault(
        problem, mend="Build the store again from files you trust.", kind="refused-pickle", file=file, item_id=key
    )


def damaged_value(problem: str, file: Path, item_id: Id | None = None) -> DataFault:
    """The fault of a key or value that cannot be what was written."""
    return DataFault(problem, mend=MEND, kind="damaged-store", file=file, item_id=item_id)
