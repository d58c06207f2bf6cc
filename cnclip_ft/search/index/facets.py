"""What is kept of the pictures of an index, column by column: which values there are, and which pictures meet conditions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import numpy as np

from cnclip_ft.search.index.folder import Index
from data_tools.columns import Where
from data_tools.store.layouts import Value

_OFFERED = 60  # values of a column up to which it is offered for choosing


class Facets:
    """Read once; 4 bytes a picture and column, and every value once.

    Args:
        columns: what is kept of each of `count` pictures, in order.
    """

    def __init__(self, columns: Iterable[Mapping[str, Value]], count: int) -> None:
        self._values: dict[str, dict[Value, int]] = {}
        codes: dict[str, array[int]] = {}
        for number, row in enumerate(columns):
            for name, value in row.items():
                if name not in codes:
                    codes[name], self._values[name] = array("i", [-1]) * count, {}
                codes[name][number] = self._values[name].setdefault(value, len(self._values[name]))
        self._codes = {name: np.frombuffer(found, np.int32) for name, found in codes.items()}
        # A server is asked with few conditions again and again.
        self.select: Callable[[Where], np.ndarray] = lru_cache(64)(self._select)

    @classmethod
    def of(cls, index: Index) -> Facets:
        return cls(index.columns() if index.info.get("columns") else (), len(index))

    @property
    def names(self) -> list[str]:
        return list(self._codes)

    def offered(self) -> dict[str, list[tuple[Value, int]]]:
        """Columns of 2 to 60 values, two pictures and more a value, each with their number, the most frequent first."""
        found: dict[str, list[tuple[Value, int]]] = {}
        for name, values in self._values.items():
            described = int((self._codes[name] >= 0).sum())
            if 2 <= len(values) <= min(_OFFERED, described // 2):
                counts = np.bincount(self._codes[name][self._codes[name] >= 0], minlength=len(values)).tolist()
                found[name] = sorted(zip(values, counts, strict=True), key=lambda pair: -pair[1])
        return found

    def _select(self, where: Where) -> np.ndarray:
        """int64 numbers of the pictures that meet `where`, ascending.

        Raises:
            RequestError: it names a column that is not kept.
        """
        where.check(self.names, "the index")
        met: np.ndarray | None = None
        for name in dict.fromkeys(condition.name for condition in where.conditions):
            own = Where([condition for condition in where.conditions if condition.name == name])
            holds = np.array([own.holds({name: value}) for value in self._values[name]] + [False])  # −1: no value
            mine = holds[self._codes[name]]
            met = mine if met is None else met & mine
        assert met is not None, "no condition"
        return np.flatnonzero(met)
