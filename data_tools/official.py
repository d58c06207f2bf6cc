"""The official LMDB layout (cn_clip 1.6.0): base64 images under decimal ids, pickled (image_id, text_id, text) pairs."""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault


class _PlainUnpickler(pickle.Unpickler):
    """Tuples of int and str need no import at all: every attempt at one is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")

    def persistent_load(self, _id: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def read_pair(value: bytes, key: str, file: Path) -> tuple[int | str, int | str, str]:
    """A pickled pair as (image_id, text_id, text).

    Raises:
        DataFault: it holds anything but a tuple of int and str; nothing of it was executed.
    """
    try:
        found = _PlainUnpickler(io.BytesIO(value)).load()
    except Exception as error:  # noqa: BLE001 - damaged pickles fail in many ways
        problem = f"the pickle under key {key} is refused: {error}"
    else:
        if isinstance(found, tuple) and len(found) == 3 and isinstance(found[2], str) and all(
            isinstance(part, (int, str)) and not isinstance(part, bool) for part in found[:2]
        ):  # fmt: skip
            return found
        problem = f"the pickle under key {key} is refused: it holds {type(found).__name__}, not (image_id, text_id, text)"
    raise DataFault(problem, mend="Build the store again from files you trust.", kind="refused-pickle", file=file, item_id=key)


def write_pair(image_id: int | str, text_id: int | str, text: str) -> bytes:
    return pickle.dumps((image_id, text_id, text), protocol=4)


def read_image(value: bytes, key: str, file: Path) -> bytes:
    """Undo the base64 (the URL-safe alphabet, which the official reader takes, and the ordinary one)."""
    try:
        return base64.b64decode(bytes(value).replace(b"-", b"+").replace(b"_", b"/"), validate=False)
    except binascii.Error as error:
        raise DataFault(f"image {key} is not base64 ({error})", mend="Build the store again.", kind="bad-base64",
                        file=file, item_id=key) from None  # fmt: skip


def write_image(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data)
