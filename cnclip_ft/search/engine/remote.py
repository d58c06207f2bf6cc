"""The pictures of an index in a Milvus collection: Milvus searches, filters and counts; here their numbers are given names."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index.collection import DEEPEST, Collection, key_of, open_collection
from cnclip_ft.search.index.expressions import expression
from cnclip_ft.search.index.listing import Key
from cnclip_ft.search.index.milvus import Away, MilvusPlace
from data_tools.columns import Where
from data_tools.errors import RequestError
from data_tools.store.layouts import Value

_FRESH = 10.0  # seconds a number of pictures is taken for the true one
_KNOWN = 50_000  # pictures whose names are kept: those that were found are asked for by number next
_FIELDS = ("id", "stamp", "columns")
Named = tuple[Key, str, dict[str, Value]]  # key, stamp, columns
_MORE = 16  # beyond k, so that equal scores at the end come in the order of numbers


class MilvusGallery:
    """`gallery.Gallery` over a collection. It changes while it is searched: `search index` shows at once.

    Raises (in every method):
        Away: the server cannot be reached.
    """

    deepest = DEEPEST - _MORE - 1

    def __init__(self, place: MilvusPlace) -> None:
        self._collection, self.info = open_collection(place)
        self._place = place
        built = self.info["approximate"] or {"kind": None, "effort": 0}
        self._kind: str | None = built["kind"]
        self._effort: int = built["effort"]
        self._counted, self._count = -np.inf, 0
        self._known: dict[int, Named] = {}
        self._lost = False

    @property
    def _asked(self) -> Collection:
        """The collection; a server that was away may have come back without holding it ready."""
        if self._lost:
            self._collection.load()
            self._lost = False
        return self._collection

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except Away:
            self._lost = True
            raise

    @property
    def place(self) -> str:
        return str(self._place)

    @property
    def exact(self) -> bool:
        return self._kind is None

    def __len__(self) -> int:
        if time.monotonic() - self._counted > _FRESH:
            with self._noticing():
                self._count, self._counted = self._asked.count(), time.monotonic()
        return self._count

    def item(self, number: int) -> tuple[Key, str]:
        found = self._named([number])
        if number not in found:
            raise IndexError(number)
        return found[number][:2]

    def described(self, numbers: Sequence[int]) -> list[tuple[Key, dict[str, Value]]]:
        named = self._named(numbers)
        # One that was taken out since it was found has no name any more.
        found = [named.get(number, ("", "", {})) for number in numbers]
        return [(key, columns) for key, _, columns in found]

    def _named(self, numbers: Sequence[int]) -> dict[int, Named]:
        """Pictures by number, without those that are not there; what is known may be let go of meanwhile."""
        known = self._known
        found = {number: known[number] for number in numbers if number in known}
        missing = [number for number in numbers if number not in found]
        for start in range(0, len(missing), 1000):
            found |= self._keep(self._rows(missing[start : start + 1000], _FIELDS))
        return found

    def _rows(self, numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        options = {"filter": f"number in {list(numbers)}", "output_fields": ["number", *fields]}
        with self._noticing():
            return self._asked.server.ask("query", self._collection.name, **options)

    def _keep(self, rows: Iterable[Mapping[str, Any]]) -> dict[int, Named]:
        found: dict[int, Named] = {row["number"]: (key_of(row["id"]), row["stamp"], row["columns"]) for row in rows}
        if len(self._known) > _KNOWN:
            self._known = {}
        self._known.update(found)
        return found

    def vector(self, number: int) -> torch.Tensor:
        rows = self._rows([number], ["vector"])
        if not rows:
            raise IndexError(number)
        return torch.tensor(rows[0]["vector"], dtype=torch.float32)

    @property
    def names(self) -> list[str]:
        return self.info["facets"]["names"]

    def offered(self) -> dict[str, list[tuple[Value, int]]]:
        return {name: [tuple(pair) for pair in values] for name, values in self.info["facets"]["offered"].items()}

    def check(self, where: Where) -> None:
        where.check(self.names, "the index")
        expression(where)

    def ready(self, device: torch.device, exact: bool) -> str | None:
        if exact and not self.exact:
            raise RequestError(
                f"{self.place} has an approximate index ({self._kind}), which Milvus cannot leave aside; give "
                "`search index … --approximate none` first"
            )
        return None

    def prepare(self) -> list[str]:
        return []

    def search(self, queries: torch.Tensor, k: int, where: Where) -> tuple[list[list[float]], list[list[int]]]:
        condition = expression(where)
        with self._noticing():
            found = self._asked.search(queries.numpy(), k + _MORE, self._effort, self._kind, condition, _FIELDS)
        for hits in found:
            self._keep(hits)
            # Milvus's products are of float32; equal pictures come in the order of their numbers, as elsewhere.
            hits.sort(key=lambda hit: (-round(hit["distance"], 6), hit["number"]))
        return [[hit["distance"] for hit in hits[:k]] for hits in found], [
            [hit["number"] for hit in hits[:k]] for hits in found
        ]

    def counts(self, questions: Sequence[Question], queries: torch.Tensor) -> list[int | None]:
        condition = expression(questions[0].where)
        # Milvus counts what meets conditions, and cannot count scores.
        counted = [question.at_least is None for question in questions]
        everything = (self._collection.count(condition) if condition else len(self)) if any(counted) else 0
        found: list[int | None] = [everything if wanted else None for wanted in counted]
        for place, question in enumerate(questions):
            count = found[place]
            if question.like is not None and count is not None:
                own = f"number == {question.like}" + (f" and ({condition})" if condition else "")
                found[place] = count - (self._collection.count(own) if condition else 1)
        return found
