"""The pictures of an index in a folder, searched exactly or with faiss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.retrieval import approximate
from cnclip_ft.retrieval.approximate import ApproximateSearch
from cnclip_ft.retrieval.exact import ExactSearch
from cnclip_ft.search.engine.query import DEEPEST, MOST, Question
from cnclip_ft.search.index.facets import Facets
from cnclip_ft.search.index.folder import Index
from cnclip_ft.search.index.listing import Key
from data_tools.columns import Where
from data_tools.store.layouts import Value


class LocalGallery:
    """`gallery.Gallery` over an opened index."""

    deepest = DEEPEST + MOST

    def __init__(self, index: Index) -> None:
        self.index = index
        self.features = torch.from_numpy(index.features)
        self.finder: ExactSearch | ApproximateSearch

    def __len__(self) -> int:
        return len(self.index)

    @property
    def place(self) -> Path:
        return self.index.folder

    @property
    def info(self) -> dict[str, Any]:
        return self.index.info

    @property
    def exact(self) -> bool:
        return isinstance(self.finder, ExactSearch)

    def item(self, number: int) -> tuple[Key, str]:
        return self.index.item(number)

    def described(self, numbers: Sequence[int]) -> list[tuple[Key, dict[str, Value]]]:
        return [self.index.described(number) for number in numbers]

    def vector(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self.index):
            raise IndexError(number)
        return self.features[number].float()

    @cached_property
    def facets(self) -> Facets:
        """What is kept of the pictures; reading it takes a second for 200,000 of them."""
        return Facets.of(self.index)

    @property
    def names(self) -> list[str]:
        return self.facets.names

    def offered(self) -> dict[str, list[tuple[Value, int]]]:
        return self.facets.offered()

    def check(self, where: Where) -> None:
        self.facets.select(where)

    def ready(self, device: torch.device, exact: bool) -> str | None:
        self.finder = ExactSearch(self.features, self.info["largest_norm"], device)
        file = self.index.approximate_file
        if file is None or exact:
            return None
        if not approximate.has_faiss():
            return f"note: searching exactly; {approximate.MISSING}"
        self._thorough = self.finder
        self.finder = approximate.read(file, self.index.features, self.info["approximate"])
        return None

    def prepare(self) -> list[str]:
        copied = isinstance(self.finder, ExactSearch) and self.finder.keep_copy()
        return ["half-precision copy of the features"] if copied else []

    @property
    def _whole(self) -> ExactSearch:
        """Conditions and counts are exact, also where the search is not."""
        return self.finder if isinstance(self.finder, ExactSearch) else self._thorough

    def search(self, queries: torch.Tensor, k: int, where: Where) -> tuple[list[list[float]], list[list[int]]]:
        if where:
            rows = torch.from_numpy(self.facets.select(where))
            scores, numbers = self._whole.search_among(rows, queries, k)
        else:
            scores, numbers = self.finder.search(queries, k)
        return scores.tolist(), numbers.tolist()

    def counts(self, questions: Sequence[Question], queries: torch.Tensor) -> list[int | None]:
        where = questions[0].where
        rows = torch.from_numpy(self.facets.select(where)) if where else None
        everything = len(self.index) if rows is None else len(rows)
        found: list[int | None] = [everything] * len(questions)
        limited = [place for place, question in enumerate(questions) if question.at_least is not None]
        if limited and rows is None and not self.exact:
            for place in limited:  # an approximate index is there so that nobody looks at all features
                found[place] = None
        elif limited:
            least = torch.tensor([questions[place].at_least for place in limited], dtype=torch.float64)
            for place, count in zip(limited, self._whole.count(queries[limited], least, rows).tolist(), strict=True):
                found[place] = count
        for place, question in enumerate(questions):
            count = found[place]
            if question.like is None or count is None or (rows is not None and question.like not in rows):
                continue
            own = float(self.features[question.like].double() @ queries[place].double())
            found[place] = count - (question.at_least is None or own >= question.at_least)
        return found
