"""A store with more behind what it holds: built again in its place, in the form it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.build import BuildReport, build_store
from data_tools.errors import RequestError
from data_tools.faults import FILE_NAME
from data_tools.items import Source
from data_tools.pictures import PIXEL_LIMIT
from data_tools.preparation import Preparation
from data_tools.sources.stored import Appended, StoreSource
from data_tools.store import PairSource, PairStore, open_store
from data_tools.store.joined import JoinedStores
from data_tools.words import many


def kept_form(store: PairSource) -> dict[str, Any]:
    """Layout and shards of a store, for what is built of it; what is none gives a store of our layout in one piece."""
    if not isinstance(store, PairStore):
        return {}
    size = None if store.shards == 1 else -(-store.image_count // store.shards)
    return {"layout": store.layout, "shard_size": size}


def append_to(source: Source, target: Path, *, update_columns: bool = False, **options: Any) -> BuildReport:
    """Put what `source` has beyond the store `target` behind it; options as `build_store`, which it raises as well.

    Layout and shards stay, unless `options` ask for others than `build_store` would make. So does the list of faults, with the new
    ones behind it.

    Args:
        update_columns: of a picture that is there, take the values of columns that `source` has.
    """
    store = open_store(target)
    if isinstance(store, JoinedStores):
        raise RequestError(f"{target} is a description over stores: append to one of them, and join them again")
    before = len(store)
    if options["layout"] == "plain" and options["shard_size"] is None:
        options |= kept_form(store)
    store.close()
    prepare = Preparation(options.get("reencoding"), options.get("pixel_limit", PIXEL_LIMIT))
    options["overwrite"] = True
    options["faults_before"] = [target / FILE_NAME, *options.get("faults_before", ())]
    appended = Appended(StoreSource(target), source, prepare, update_columns=update_columns)
    report = build_store(appended, target, **options)
    added = report.pairs - before
    report.notes.insert(
        0, f"{many(added, 'pair')} {'was' if added == 1 else 'were'} added to the {before:,} that were there"
    )
    return report
