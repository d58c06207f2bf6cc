"""What an engine asks of the pictures it looks among: a folder's, exactly or with faiss (`local.py`), or a Milvus collection's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.index.listing import Key
from data_tools.columns import Where
from data_tools.store.layouts import Value


class Gallery(Protocol):
    """Pictures of an index, by number; several threads may ask.

    Attributes:
        info: what the index says of itself: `checkpoint`, `identity`, `source`.
        exact: whether the nearest are found for certain. deepest: how far down a question may look.
    """

    deepest: int

    @property
    def place(self) -> str | Path: ...

    @property
    def info(self) -> dict[str, Any]: ...

    @property
    def exact(self) -> bool: ...

    def __len__(self) -> int: ...

    def item(self, number: int) -> tuple[Key, str]:
        """(key, stamp) of a picture.

        Raises:
            IndexError: no such number.
        """
        ...

    def described(self, numbers: Sequence[int]) -> list[tuple[Key, dict[str, Value]]]:
        """(key, what is kept of it) of pictures that were found."""
        ...

    def vector(self, number: int) -> torch.Tensor:
        """float32 ``[dim]``.

        Raises:
            IndexError: no such number.
        """
        ...

    @property
    def names(self) -> list[str]:
        """Columns that are kept."""
        ...

    def offered(self) -> dict[str, list[tuple[Value, int]]]:
        """Columns of few values, each with how many pictures have it, the most frequent first."""
        ...

    def check(self, where: Where) -> None:
        """Raises:
        RequestError: these conditions cannot be looked for here.
        """
        ...

    def ready(self, device: torch.device, exact: bool) -> str | None:
        """Before the first question; what there is to note, in words.

        Args:
            device: where the model is. exact: leave an approximate index aside.
        """
        ...

    def prepare(self) -> list[str]:
        """Spend seconds and memory so that every question is quicker; what was done, in words."""
        ...

    def search(self, queries: torch.Tensor, k: int, where: Where) -> tuple[list[list[float]], list[list[int]]]:
        """Unit float32 ``[q, dim]`` → scores and numbers of the `k` best that meet `where`, best first; fewer, or −1: none."""
        ...

    def counts(self, questions: Sequence[Question], queries: torch.Tensor) -> list[int | None]:
        """How many pictures a question has: those that meet its `where` and reach its `at_least`, without the one it asks
        with; None: not counted. All have the same `where`."""
        ...
