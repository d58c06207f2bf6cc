"""Arrays as files that are never whole in memory, and sequences of which nothing is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import IO, TypeVar, overload

import numpy as np

Item = TypeVar("Item", covariant=True)


class ReadWhenAsked(Sequence[Item]):
    """A sequence whose members are read at their position."""

    @abstractmethod
    def at(self, position: int) -> Item:
        """Member `position`, 0 … ``len(self)`` − 1."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        count = len(self)
        if isinstance(index, slice):
            return [self.at(position) for position in range(*index.indices(count))]
        if not -count <= index < count:
            raise IndexError(index)
        return self.at(index + count if index < 0 else index)


def write_array(file: IO[bytes], blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array ``.npy`` of blocks one behind the other, which are never all in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).data)
