"""What a source holds now: a key and a stamp for every picture, and how its bytes are read.

A stamp says whether a picture is still the one that was encoded: size and time of change of a file, a hash of the
content in a store (a store's pictures have no times).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from cnclip_ft.evaluation.sources import IMAGE_ENDINGS, is_store
from data_tools.errors import DataFault, RequestError
from data_tools.store import open_store

Key = int | str
_FILE_LIMIT = 1 << 30  # bytes; nothing larger is a picture somebody wants to look at


@dataclass
class Listing:
    """Pictures in a fixed order. `read` gives a picture's encoded bytes and may be sent to other processes."""

    kind: str  # "folder" | "store"
    name: str
    path: Path
    stamps: dict[Key, str]
    read: Callable[[Key], bytes]


class FolderBytes:
    """Key (path below the folder, with forward slashes) → bytes.

    Raises (when called):
        OSError: the file is gone or cannot be read.
        DataFault: it lies outside the folder, or is larger than a GiB.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: Key) -> bytes:
        if PurePosixPath(str(key)).is_absolute() or ".." in Path(str(key)).parts:
            raise DataFault("outside of the folder", mend="Make the index anew.", kind="outside", file=str(key))
        path = self.folder / str(key)
        if path.stat().st_size > _FILE_LIMIT:
            raise DataFault("larger than a GiB", mend="Shrink it or leave it out.", kind="image-too-large", file=path)
        return path.read_bytes()


class StoreBytes:
    """Image id → bytes; `KeyError` where the store has it no more."""

    def __init__(self, path: Path) -> None:
        self.store = open_store(path)

    def __call__(self, key: Key) -> bytes:
        return self.store.image(key)


def list_source(path: str | Path) -> Listing:
    """The pictures of a folder (with its sub-folders) or of a store.

    Raises:
        RequestError: neither, or no picture in it.
    """
    path = Path(path)
    if path.is_dir() and is_store(path):
        return _list_store(path)
    if not path.is_dir():
        raise RequestError(f"{path}: no such folder or store; name a folder of pictures or a split (e.g. DATA/valid)")
    stamps = _list_files(path)
    if not stamps:
        endings = " ".join(sorted(IMAGE_ENDINGS))
        raise RequestError(f"{path} holds no pictures ({endings}) and is no store")
    return Listing("folder", path.resolve().name, path.resolve(), stamps, FolderBytes(path.resolve()))


def read_bytes(kind: str, path: str | Path) -> Callable[[Key], bytes]:
    """How an index's pictures are read later; a source that is gone fails picture by picture, not here."""
    if kind == "folder":
        return FolderBytes(Path(path))
    try:
        return StoreBytes(Path(path))
    except RequestError:
        return _nothing


def _nothing(key: Key) -> bytes:
    raise KeyError(key)


def _list_files(folder: Path) -> dict[Key, str]:
    """Sorted by path. `scandir` names and stats in one go: half the time of `rglob` on a million files."""
    found: dict[Key, str] = {}
    open_folders = [folder]
    with tqdm(desc="looking", unit=" pictures", disable=None, delay=2.0, leave=False) as bar:
        while open_folders:
            here = open_folders.pop()
            try:
                entries = list(os.scandir(here))
            except OSError as error:
                raise RequestError(f"{here} cannot be read ({error.strerror}); give yourself the right to") from None
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append(Path(entry.path))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS and entry.is_file():
                    stat = entry.stat()
                    key = Path(entry.path).relative_to(folder).as_posix()
                    found[key] = f"{stat.st_size}-{stat.st_mtime_ns}"
                    bar.update()
    return dict(sorted(found.items()))


def _list_store(path: Path) -> Listing:
    read = StoreBytes(path)
    ids = read.store.image_ids
    bar = tqdm(ids, desc="looking", unit=" pictures", disable=None, delay=2.0, leave=False)
    stamps: dict[Key, str] = {image_id: hashlib.blake2b(read(image_id), digest_size=16).hexdigest() for image_id in bar}
    if not stamps:
        raise RequestError(f"{path}: the store holds no pictures")
    return Listing("store", path.resolve().name, path.resolve(), stamps, read)
