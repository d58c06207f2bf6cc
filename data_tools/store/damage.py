"""A store against its manifest: which pictures, pairs or pages are not what the store was finished with."""

from __future__ import annotations

from pathlib import Path

from data_tools.bars import Bar
from data_tools.store import manifest
from data_tools.store.joined import JoinedStores
from data_tools.store.layouts import BESIDE, LONE, Id, Layout
from data_tools.store.manifest import BLOCK, Manifest, data_files
from data_tools.store.pages import check_runs, damaged, keys_of, walk
from data_tools.store.reader import PairStore
from data_tools.store.shard import Shard, shard_folders

_NAMED = 10


def refuse_damage(store: PairStore, progress: bool = True) -> None:
    """Compare every byte with the manifest; without one, look at the pages of every value at least.

    Raises:
        DataFault: the first damaged file, with the pictures or pairs that are hurt.
    """
    if isinstance(store, JoinedStores):
        for each in store.stores:
            refuse_damage(each, progress)
        return
    found = store.manifest
    if found is None:
        for shard in store._open():
            for file in shard.files:
                check_runs(walk(file))
        return
    files = data_files(store.path, shard_folders(store.path))
    manifest.compare_sizes(found, store.path, files)
    total = sum(size for size, _ in found.files.values())
    with Bar(total=total, desc=f"{store.name}: files", unit="B", unit_scale=True, shown=progress, delay=1.0) as bar:
        for shard in store._open():
            for file in shard.files:
                _compare(found, shard, file, file.relative_to(store.path).as_posix(), bar)


def _compare(found: Manifest, shard: Shard, file: Path, name: str, bar: Bar) -> None:
    blocks = manifest.damaged_blocks(found, name, file, bar)
    if not blocks:
        return
    tree = walk(file)
    pages = {
        page
        for block in blocks
        for page in range(block * BLOCK // tree.page_size, -(-(block + 1) * BLOCK // tree.page_size))
    }
    of_images = file is not shard.pairs_file
    what = ", ".join(_name(shard.layout, of_images, key) for key in keys_of(tree, pages)[:_NAMED])
    what = f"columns of {what}" if what and of_images and file is not shard.images_file else what
    count = len(keys_of(tree, pages))
    problem = (
        f"{what}{' …' if count > _NAMED else ''} ({count:,} in all) differ from what was written"
        if count
        else f"its pages {sorted(pages)[:_NAMED]} differ from what was written, which hold no picture or pair"
    )
    fault = damaged(file, problem)
    fault.item_id = what or None
    raise fault


def _name(layout: Layout, image: bool, key: bytes) -> str:
    try:
        if image:
            return f"image {layout.image_id(key)!r}" if key != layout.image_count_key else "the count of images"
        if key.startswith(LONE) and len(key) == 12:
            return f"text {int.from_bytes(key[4:], 'big')} without image"
        if key.startswith(BESIDE) and len(key) == len(BESIDE) + 8:
            return f"what stands beside pair {int.from_bytes(key[len(BESIDE) :], 'big')}"
        number: Id = int.from_bytes(key, "big") if layout.pair_count_key is None and len(key) == 8 else key.decode()
        return f"pair {number}"
    except (ValueError, LookupError):
        return f"key {key!r}"
