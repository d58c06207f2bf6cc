"""Pairs in shards as they lie: WebDataset tars, and Parquet files with picture bytes. Nothing is copied but ids, texts and offsets.

places    which shards a pattern, a folder or a file means
part      one shard → its part of the index: where its pictures begin, their sums, its pairs
joining   the parts → one index of arrays that are mapped
index     brings the index up to date, with whoever else is at it; where it is kept
files     pictures out of shards by place, with a bounded number of open files
source    ShardSource: a `PairSource` over an index
opening   open_pairs: a store, or shards
"""

from __future__ import annotations

from data_tools.shards.opening import is_pairs, open_pairs
from data_tools.shards.source import ShardSource

__all__ = ["ShardSource", "is_pairs", "open_pairs"]
