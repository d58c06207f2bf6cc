"""What a source holds now: a key and a stamp for every picture, and how its bytes are read.

A stamp says whether a picture is still the one that was encoded: size and time of change of a file, a hash of the
content in a store (a store's pictures have no times).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import read_file
from data_tools.shards import is_pairs, open_pairs
from data_tools.store import PairSource, is_store
from data_tools.store.layouts import Value
from data_tools.walk import walk

Key = int | str


@dataclass
class Listing:
    """Pictures in a fixed order. `read` gives a picture's encoded bytes and may be sent to other processes.

    `notes` say what was passed over. What lies in `closed` (folders without rights, links to a drive that is away)
    could not be looked at: nobody knows whether it is gone.
    """

    kind: str  # "folder" | "store"
    name: str
    path: Path
    stamps: dict[Key, str]
    read: Callable[[Key], bytes]
    notes: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    columns: Callable[[Key], dict[str, Value]] | None = None  # what is kept of a picture, where anything is

    def columns_digest(self) -> str | None:
        """Changes when what is kept of any picture does."""
        if self.columns is None:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for key in self.stamps:
            digest.update(json.dumps([key, self.columns(key)], sort_keys=True).encode())
        return digest.hexdigest()

    def keep_unseen(self, before: dict[Key, str]) -> int:
        """Take over the stamps of pictures that lie where nobody could look; their number."""
        places = tuple(f"{place.rstrip('/')}/" for place in self.closed)
        unseen = {key: stamp for key, stamp in before.items() if key not in self.stamps and str(key).startswith(places)}
        self.stamps |= unseen if places else {}
        return len(unseen) if places else 0


class FolderBytes:
    """Key (path below the folder, with forward slashes) → bytes.

    Raises (when called):
        DataFault: it is gone, cannot be read, lies outside the folder, or is larger than a GiB.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: Key) -> bytes:
        if PurePosixPath(str(key)).is_absolute() or ".." in Path(str(key)).parts:
            raise DataFault("outside of the folder", mend="Make the index anew.", kind="outside", file=str(key))
        return read_file(self.folder / str(key))


class StoreBytes:
    """Image id → bytes; `KeyError` where the store has it no more."""

    def __init__(self, path: Path) -> None:
        self.store = open_pairs(path)

    def __call__(self, key: Key) -> bytes:
        return self.store.image(key)


def list_source(path: str | Path) -> Listing:
    """The pictures of a folder (with its sub-folders), of a store or of shards.

    Raises:
        RequestError: neither, or no picture in it.
    """
    path = Path(path)
    if is_store(path) or (not path.is_dir() and is_pairs(path)):
        return _list_store(path)
    if not path.is_dir():
        raise RequestError(f"{path}: no such folder or store; name a folder of pictures or a split (e.g. DATA/valid)")
    with Bar(desc="looking", unit=" pictures", delay=2.0) as bar:
        found = walk(path, each=bar.update)
    if not found.pictures and is_pairs(path):
        return _list_store(path)
    if not found.pictures:
        raise RequestError(f"{found.nothing()}; and it is no store")
    stamps: dict[Key, str] = {name: f"{size}-{changed}" for name, size, changed in found.pictures}
    whole = path.resolve()
    return Listing("folder", whole.name, whole, stamps, FolderBytes(whole), found.lines(), found.closed)


def _list_store(path: Path) -> Listing:
    read = StoreBytes(path)
    ids = read.store.image_ids
    bar = Bar(ids, desc="looking", unit=" pictures", delay=2.0)
    stamps: dict[Key, str] = {image_id: hashlib.blake2b(read(image_id), digest_size=16).hexdigest() for image_id in bar}
    if not stamps:
        raise RequestError(f"{path}: the store holds no pictures")
    return Listing("store", path.resolve().name, path.resolve(), stamps, read, columns=_columns(read.store))


def _columns(store: PairSource) -> Callable[[Key], dict[str, Value]] | None:
    """What a store keeps of a picture, and as `caption` its first text: a shop's title became the text, and is no column."""
    if not store.columns:
        return None
    captions: dict[Key, str] = {}
    for pair in store.pairs():
        captions.setdefault(pair.image_id, pair.text)

    def columns(key: Key) -> dict[str, Value]:
        kept = store.columns_of(key)
        return {**kept, "caption": kept.get("caption", captions[key])} if key in captions else kept

    return columns
