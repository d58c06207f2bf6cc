"""Reading a finished store back before it takes its place, and noting what its files are."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import DataFault, UserError
from data_tools.store.checksum import image_digest
from data_tools.store.manifest import MANIFEST, data_files, write_manifest
from data_tools.store.opening import open_store
from data_tools.store.seen import Seen, text_hash
from data_tools.store.shard import shard_folders

_SAMPLE = 200


def verify(folder: Path, seen: Seen, samples: dict[int, dict[str, str]]) -> None:
    """Compare sampled images and up to 200 pairs spread over the store with what was put in, then write the manifest.

    Opening has counted what is there already.

    Args:
        samples: shard → key in hex → hash in hex, of images.

    Raises:
        UserError: something reads back differently; the disk may be failing.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # of a build that was interrupted here
    try:
        store = open_store(folder)
    except DataFault as fault:
        raise _different(folder, f"it cannot be read back ({fault})") from None
    try:
        pairs = len(store)
        for number, sample in samples.items():
            for key, digest in sample.items():
                image_id, data = store.image_of_key(number, bytes.fromhex(key))
                if data is None or image_digest(image_id, data).hex() != digest:
                    raise _different(folder, f"image {image_id!r} reads back differently")
        for index in range(0, pairs, max(1, pairs // _SAMPLE)):
            pair = store[index]
            known = seen.text(pair.text_id)
            if known is None or known[1] != text_hash(pair.text) or pair.image_id not in store:
                raise _different(folder, f"pair {index} reads back differently")
        for _ in store.all_beside():
            pass
        folders = shard_folders(folder)
        build = store.about["build"]
        write_manifest(folder, data_files(folder, folders), build=build, checksum=store.checksum(), order=store.order())
    finally:
        store.close()


def _different(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: {what}; the disk may be failing. Build again on another one.")
