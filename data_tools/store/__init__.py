"""The store: one split's pairs and pictures in LMDB (format: docs/store-format.md). The reader, the writer.

contract  PairSource: what a store promises, and Pair
reader    PairStore: pairs by number, pictures by id
opening   open_store, is_store, stores_below: which folder is a store, and whether it is whole
writer    StoreWriter: beside its place, verified, put there in one step
place     what may be replaced, where a store is built, how it takes its place
layouts   our records and the official ones          parts, seen, verify    what the writer writes into
beside    what a pair has beside its text
environments                                          LMDB
"""

from __future__ import annotations

from data_tools.store.contract import Pair, PairSource
from data_tools.store.layouts import Id
from data_tools.store.opening import is_store, open_store, stores_below
from data_tools.store.place import refuse_place
from data_tools.store.reader import PairStore
from data_tools.store.writer import StoreWriter

__all__ = [
    "Id",
    "Pair",
    "PairSource",
    "PairStore",
    "StoreWriter",
    "is_store",
    "open_store",
    "refuse_place",
    "stores_below",
]
