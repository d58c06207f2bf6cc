"""Opening a store: which folder it lies in, and whether its shards and its manifest belong together."""

from __future__ import annotations

import os
from pathlib import Path

from data_tools.errors import DataFault, RequestError
from data_tools.scratch import OLD, scratch_folder
from data_tools.store.joined import JoinedStores, is_joined, read_description
from data_tools.store.manifest import MEANT, compare_samples, compare_sizes, data_files
from data_tools.store.pages import MEND
from data_tools.store.reader import PairStore
from data_tools.store.shard import shard_folders

PURPOSE = "building"  # of the working folder (`data_tools.store.place`)
_PARTS = ("pairs", "imgs")


def is_store(path: Path) -> bool:
    """By its files: a folder of pictures may have sub-folders called ``imgs`` or ``pairs``. So is a description over stores."""
    return is_joined(path) or any(
        (shard / part / "data.mdb").is_file() for shard in shard_folders(path) for part in _PARTS
    )


def stores_below(folder: Path) -> list[Path]:
    """The splits in a folder of splits; not descriptions over them."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_store(path)) if folder.is_dir() else []


def open_store(path: str | Path, *, sample: bool = True) -> PairStore:
    """Open ``<dir>/<split>``, our layout or the official one, in one piece or in shards; or several by their description.

    Args:
        sample: compare some of every file with the manifest; `refuse_damage` compares all of it.

    Raises:
        RequestError: it is not a store, or of an unknown format.
        DataFault: it is damaged, copied in part, or put together from several stores.
    """
    path = Path(path)
    if is_joined(path):
        return _open_joined(path, sample)
    place = path if path.exists() else _replaced(path)
    if not place.exists():
        raise RequestError(
            f"{path}: no such folder. Build a store with `cnclip-ft data build` or `cnclip-ft data import`."
        )
    for folder in shard_folders(place):
        for part in _PARTS:
            if not (folder / part / "data.mdb").is_file():
                raise RequestError(
                    f"{path} is not a store: {(folder / part / 'data.mdb').relative_to(place)} is missing{_named(stores_below(place))}. "
                    "Build one with `cnclip-ft data build`."
                )
    store = PairStore(place)
    store.name = path.name
    _refuse_mixture(store, sample)
    return store


def _open_joined(path: Path, sample: bool) -> JoinedStores:
    said, stores = read_description(path), list[PairStore]()
    for number, member in enumerate(said.stores, 1):
        place = path.parent / member.path
        store = open_store(place, sample=sample)
        if isinstance(store, JoinedStores):
            raise RequestError(
                f"{path}: store {number}, {place}, is a description itself; join the stores that it names"
            )
        if store.generation != member.generation:
            raise DataFault(
                f"store {number} of {len(said.stores)}, {place}, is another one than was joined",
                mend="Bring it back, or join the stores again: cnclip-ft data join.",
                kind="damaged-store",
                file=path,
            )
        stores.append(store)
    return JoinedStores(path, stores, said.shared)


def _refuse_mixture(store: PairStore, sample: bool) -> None:
    """Shards that are missing, in another's place or of another store, files the manifest does not speak of."""
    shards, path = store._open(), store.path
    stated = shards[0].meta.get("shards", 1)
    if stated != len(shards):
        raise RequestError(
            f"{path}: {len(shards)} shards are there, the store has {stated}. Bring the missing ones back."
        )
    for number, shard in enumerate(shards):
        found = [shard.meta.get(name) for name in ("shards", "build", "layout")]
        if found != [shards[0].meta.get(name) for name in ("shards", "build", "layout")]:
            raise DataFault(
                f"{shard.folder.name} is of another store than {shards[0].folder.name}",
                mend=MEND,
                kind="damaged-store",
                file=path,
            )
        if shard.meta.get("shard", number) != number:
            raise DataFault(
                f"{shard.folder.name} is shard {shard.meta['shard']} of the store",
                mend="Give it its name back.",
                kind="damaged-store",
                file=path,
            )
    if store.manifest is not None:
        if store.manifest.build != shards[0].meta.get("build"):
            raise DataFault("the manifest is that of another build", mend=MEANT, kind="damaged-store", file=path)
        compare = compare_samples if sample else compare_sizes
        compare(store.manifest, path, data_files(path, shard_folders(path)))


def _named(splits: list[Path]) -> str:
    return f"; name a split: {', '.join(map(str, splits))}" if splits else ""


def _replaced(path: Path) -> Path:
    """Where the old store lies if a build died between the two renames that replace it."""
    return scratch_folder(Path(os.path.realpath(path)), PURPOSE) / OLD
