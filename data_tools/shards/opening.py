"""Opening a source of pairs: a store, or shards as they lie."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import RequestError
from data_tools.shards.index import Shards
from data_tools.shards.places import is_shards
from data_tools.shards.source import ShardSource
from data_tools.store import is_store, open_store
from data_tools.store.contract import PairSource


def is_pairs(place: str | Path) -> bool:
    """Whether a store or shards are there."""
    return is_store(Path(place)) or is_shards(place)


def open_pairs(place: str | Path, *, sample: bool = True, workers: int = 0) -> PairSource:
    """A store, or shards: a pattern (``shards/{00000..00099}.tar``), a folder of tars or Parquet files, or one of them.

    Shards without an index get one first, which reads them once.

    Args:
        sample: as `open_store`. workers: processes that read shards for the index beside this one.

    Raises:
        RequestError: neither is there, or a shard is missing, packed or none.
        DataFault, UserError: as `open_store`; or the index cannot be written.
    """
    if is_store(Path(place)) or not is_shards(place):
        return open_store(place, sample=sample)
    shards = Shards(place)
    source = ShardSource(Path(place), shards.files, shards.index(workers))
    if not len(source):
        told = source.faults_in_words() or "they are empty"
        raise RequestError(f"{place}: no picture with a caption is in the shards: {told}")
    return source
