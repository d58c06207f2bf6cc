"""Reading a finished store back before it takes its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_tools.errors import UserError
from data_tools.store.layouts import id_key
from data_tools.store.reader import open_store
from data_tools.store.seen import Seen, text_hash

_SAMPLE = 200


def verify(folder: Path, seen: Seen, samples: dict[int, dict[str, str]]) -> None:
    """Count what is there, and compare sampled images and up to 200 pairs spread over the store with what was put in.

    Args:
        samples: shard → key in hex → hash in hex, of images.

    Raises:
        UserError: something reads back differently; the disk may be failing.
    """
    store = open_store(folder)
    try:
        images, pairs = store.image_count, len(store)
        found = store.count_entries()
        if found != (images, pairs, len(store.lone_texts)):
            raise _different(
                folder, f"{found} images, pairs and texts without image were read back, not {images, pairs}"
            )
        for number, sample in samples.items():
            for key, digest in sample.items():
                image_id, data = store.image_of_key(number, bytes.fromhex(key))
                if data is None or hashlib.sha256(id_key(image_id) + b"\0" + data).hexdigest() != digest:
                    raise _different(folder, f"image {image_id!r} reads back differently")
        for index in range(0, pairs, max(1, pairs // _SAMPLE)):
            pair = store[index]
            known = seen.text(pair.text_id)
            if known is None or known[1] != text_hash(pair.text) or pair.image_id not in store:
                raise _different(folder, f"pair {index} reads back differently")
    finally:
        store.close()


def _different(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: {what}; the disk may be failing. Build again on another one.")
