"""The pictures of an index as a Milvus collection, and beside it `NAME_about`: by which model, of what, and what is damaged.

::

    NAME        id       the picture's key: a path or an id        number   stays with the picture; that of one that is gone is never given again
                stamp    as in listing.py                          kept     hash of what is kept of it
                columns  what is kept of it (JSON)                 numbers  the numbers that conditions compare (JSON)
                vector   [dim] float32, unit length; inner product
    NAME_about  id       "index", or "damaged:" and a picture's id
                what     JSON: the description; [stamp, fault]     vector   two zeros: Milvus wants one

Rows are put by picture id, so that the same row twice is one row. The description stands before the first picture;
its `finished` says that all pictures were there once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnclip_ft.search.index.listing import Key
from cnclip_ft.search.index.milvus import Milvus, MilvusPlace
from data_tools.errors import RequestError, UserError

FORMAT = 1
DEEPEST = 16_384  # results of one question, and rows of one answer: Milvus's own limit
_INFO, _DAMAGED = "index", "damaged:"
_TEXT = 65_535  # bytes of a text field
_BYTES = 8 * 2**20  # of one call, whose limit is 64 MiB
_LINKS, _CARE = 32, 200  # of an HNSW graph
KINDS = {None: "FLAT", "hnsw": "HNSW", "ivf": "IVF_FLAT"}


@dataclass(frozen=True)
class Held:
    """A picture of the collection, without its vector."""

    stamp: str
    number: int
    kept: str


def row_id(key: Key) -> str:
    """A number as its digits, a text as itself; a text of digits or of no UTF-8 as JSON, so that no two keys are one."""
    if isinstance(key, int):
        return str(key)
    plain = not re.fullmatch(r"-?\d+", key) and not key.startswith('"') and key.isprintable()
    return key if plain else json.dumps(key)


def key_of(row: str) -> Key:
    """The key of `row_id`."""
    if row.startswith('"'):
        return json.loads(row)
    return int(row) if re.fullmatch(r"-?\d+", row) else row


def rows_together(dim: int) -> int:
    """Rows of one call."""
    return max(1, min(4000, _BYTES // (4 * dim)))


class Collection:
    """An index in a Milvus collection, over a connection."""

    def __init__(self, server: Milvus) -> None:
        self.server, self.place = server, server.place
        self.name, self._about = self.place.name, f"{self.place.name}_about"

    def info(self) -> dict[str, Any] | None:
        """The description; None: there is no index.

        Raises:
            RequestError: a collection of this name is none of ours, or of a format this version does not know.
        """
        there = self.server.ask("has_collection", self.name)
        if not self.server.ask("has_collection", self._about):
            if there:
                raise RequestError(
                    f"{self.place}: the collection {self.name!r} was not made by cnclip-ft; name another with "
                    f"milvus:{self.place.uri}#NAME"
                )
            return None
        self.server.ask("load_collection", self._about)
        rows = self.server.ask("get", self._about, ids=[_INFO], output_fields=["what"], consistency_level="Strong")
        if not rows:
            return None
        info = json.loads(rows[0]["what"])
        if info.get("format") != FORMAT:
            raise RequestError(f"{self.place}: format {info.get('format')!r} is not known here; use a newer cnclip-ft")
        if not there:
            return None  # stopped between the description and the collection
        self.server.ask("load_collection", self.name)
        return info

    def create(self, info: dict[str, Any]) -> None:
        """Anew and empty, whatever was there of this index."""
        from pymilvus import DataType, MilvusClient

        for name in (self.name, self._about):
            if self.server.ask("has_collection", name):
                self.server.ask("drop_collection", name)
        about = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        about.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_TEXT)
        about.add_field("what", DataType.VARCHAR, max_length=_TEXT)
        about.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        self.server.ask("create_collection", self._about, schema=about, index_params=index)
        self.describe(info)
        rows = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        rows.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_TEXT)
        rows.add_field("number", DataType.INT64)
        rows.add_field("stamp", DataType.VARCHAR, max_length=256)
        rows.add_field("kept", DataType.VARCHAR, max_length=64)
        rows.add_field("columns", DataType.JSON)
        rows.add_field("numbers", DataType.JSON)
        rows.add_field("vector", DataType.FLOAT_VECTOR, dim=info["dim"])
        index = MilvusClient.prepare_index_params()
        index.add_index("number", index_type="INVERTED")
        kind = (info.get("approximate") or {}).get("kind")
        index.add_index("vector", index_type=KINDS[kind], metric_type="IP", params=_parameters(kind, 0))
        self.server.ask("create_collection", self.name, schema=rows, index_params=index)
        self.server.ask("load_collection", self.name)

    def describe(self, info: dict[str, Any]) -> None:
        """Put the description."""
        what = json.dumps({"format": FORMAT, **info}, ensure_ascii=False)
        if len(what.encode("utf-8", "replace")) > _TEXT and info.get("facets"):
            return self.describe({**info, "facets": {"names": info["facets"]["names"], "offered": {}}})
        if len(what.encode("utf-8", "replace")) > _TEXT:
            raise UserError(
                f"{self.place}: the description of the index is longer than Milvus's {_TEXT:,} bytes of a text"
            )
        self._put_about([(_INFO, what)])
        return None

    def reindex(self, kind: str | None, count: int) -> None:
        """Build the index of the vectors anew, of another kind or for another number of them."""
        from pymilvus import MilvusClient

        self.server.ask("release_collection", self.name)
        self.server.ask("drop_index", self.name, "vector")
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type=KINDS[kind], metric_type="IP", params=_parameters(kind, count))
        self.server.ask("create_index", self.name, index)
        self.server.ask("load_collection", self.name)

    def held(self) -> dict[Key, Held]:
        """What the collection holds now."""
        fields = ["id", "stamp", "number", "kept"]
        return {
            key_of(row["id"]): Held(row["stamp"], row["number"], row["kept"])
            for rows in self.walk(fields, DEEPEST)
            for row in rows
        }

    def walk(self, fields: Sequence[str], rows: int) -> Iterator[list[dict[str, Any]]]:
        """All rows, so many at once."""
        rows = min(rows, DEEPEST)
        options = {"output_fields": list(fields), "consistency_level": "Strong"}
        iterator = self.server.ask("query_iterator", self.name, batch_size=rows, **options)
        while found := self.server.following(iterator):
            yield found
        iterator.close()

    def damaged(self) -> dict[Key, tuple[str, str]]:
        """Key → (stamp, fault) of the pictures that could not be decoded."""
        iterator = self.server.ask(
            "query_iterator",
            self._about,
            filter=f'id like "{_DAMAGED}%"',
            batch_size=DEEPEST,
            output_fields=["id", "what"],
            consistency_level="Strong",
        )
        found: dict[Key, tuple[str, str]] = {}
        while rows := self.server.following(iterator):
            for row in rows:
                stamp, fault = json.loads(row["what"])
                found[key_of(row["id"].removeprefix(_DAMAGED))] = stamp, fault
        iterator.close()
        return found

    def put(self, rows: list[dict[str, Any]]) -> None:
        """Put rows, each whole, in place of those of the same id."""
        if rows:
            with self.server.writing():
                self.server.ask("upsert", self.name, rows)

    def put_damaged(self, rows: Sequence[tuple[Key, str, str]]) -> None:
        self._put_about([(_DAMAGED + row_id(key), json.dumps([stamp, fault])) for key, stamp, fault in rows])

    def _put_about(self, rows: list[tuple[str, str]]) -> None:
        if rows:
            self.server.ask(
                "upsert", self._about, [{"id": name, "what": what, "vector": [0.0, 0.0]} for name, what in rows]
            )

    def vectors(self, keys: Sequence[Key]) -> dict[Key, np.ndarray]:
        """float32 ``[dim]`` of pictures that are there."""
        ids = [row_id(key) for key in keys]
        rows = self.server.ask("get", self.name, ids=ids, output_fields=["id", "vector"], consistency_level="Strong")
        return {key_of(row["id"]): np.asarray(row["vector"], np.float32) for row in rows}

    def forget(self, keys: Sequence[Key]) -> None:
        """Take pictures out; those that are not there are passed over."""
        self._delete(self.name, [row_id(key) for key in keys])

    def forget_damaged(self, keys: Sequence[Key]) -> None:
        self._delete(self._about, [_DAMAGED + row_id(key) for key in keys])

    def _delete(self, name: str, ids: list[str]) -> None:
        for start in range(0, len(ids), 1000):
            self.server.ask("delete", name, ids=ids[start : start + 1000])

    def settle(self) -> None:
        """Have what was put written and indexed."""
        with self.server.writing():
            for name in (self.name, self._about):
                self.server.ask("flush", name)
        self.load()

    def load(self) -> None:
        """Have it ready to be asked."""
        for name in (self.name, self._about):
            self.server.ask("load_collection", name)

    def count(self, condition: str = "", **options: Any) -> int:
        """Pictures, or those that meet an expression."""
        rows = self.server.ask("query", self.name, filter=condition, output_fields=["count(*)"], **options)
        return int(rows[0]["count(*)"])

    def search(
        self,
        queries: np.ndarray,
        k: int,
        effort: int,
        kind: str | None,
        condition: str = "",
        fields: Sequence[str] = (),
    ) -> list[list[dict[str, Any]]]:
        """The `k` (at most `DEEPEST`) nearest a question: `distance` and the `fields` of each, the best first."""
        found = self.server.ask(
            "search",
            self.name,
            data=list(queries),
            anns_field="vector",
            limit=min(k, DEEPEST),
            filter=condition,
            output_fields=["number", *fields],
            search_params={"metric_type": "IP", "params": _asking(kind, effort, min(k, DEEPEST))},
        )
        return [[{**hit["entity"], "id": hit["id"], "distance": hit["distance"]} for hit in hits] for hits in found]


def _parameters(kind: str | None, count: int) -> dict[str, int]:
    if kind == "hnsw":
        return {"M": _LINKS, "efConstruction": _CARE}
    return {"nlist": max(1, min(65_536, int(4 * math.sqrt(count))))} if kind == "ivf" else {}


def _asking(kind: str | None, effort: int, k: int) -> dict[str, int]:
    if kind == "hnsw":
        return {"ef": max(effort, 2 * k + 16)}
    return {"nprobe": effort} if kind == "ivf" else {}


def open_collection(place: MilvusPlace) -> tuple[Collection, dict[str, Any]]:
    """For answering.

    Raises:
        RequestError: no index there, or an unfinished one. Away: Milvus cannot be reached.
    """
    collection = Collection(Milvus(place))
    info = collection.info()
    if info is None or not info["finished"]:
        collection.server.close()
        hint = (
            "make one: cnclip-ft search index … --to"
            if info is None
            else "it is unfinished: give the `search index` command again"
        )
        raise RequestError(f"{place} holds no index ({hint})")
    return collection, info
