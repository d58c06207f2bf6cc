"""Reading a finished store back before it takes its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_tools.errors import UserError
from data_tools.store.layouts import id_key
from data_tools.store.reader import open_store
from data_tools.store.seen import Seen, short_hash

_SAMPLE = 200


def verify(folder: Path, seen: Seen) -> None:
    """Count what is there, and compare up to 200 images and 200 pairs spread over the store with what was put in.

    Raises:
        UserError: something reads back differently; the disk may be failing.
    """
    store = open_store(folder)
    try:
        images, pairs = store.image_count, len(store)
        found = (sum(1 for _ in store.image_ids), *store.count_entries())
        if found != (images, pairs, len(store.lone_texts)):
            raise _different(folder, f"{found} images, pairs and texts without image were read back, not {images, pairs}")
        step = max(1, images // _SAMPLE)
        accepted = ((image_id, image) for image_id, image in seen.images() if not image.refused)
        for number, (image_id, image) in enumerate(accepted):
            if number % step == 0:
                stored = image.number or image_id
                digest = hashlib.sha256(id_key(stored) + b"\0" + store.image(stored)).digest()
                if digest[:8] != image.digest:
                    raise _different(folder, f"image {image_id!r} reads back differently")
        for index in range(0, pairs, max(1, pairs // _SAMPLE)):
            pair = store[index]
            known = seen.text(pair.text_id)
            if known is None or known[1] != short_hash(pair.text) or pair.image_id not in store:
                raise _different(folder, f"pair {index} reads back differently")
    finally:
        store.close()


def _different(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: {what}; the disk may be failing. Build again on another one.")
