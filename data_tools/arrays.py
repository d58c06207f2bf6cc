"""Arrays as files that are never whole in memory, and sequences of which nothing is, or 8 bytes a member."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar, overload

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


_AT_ONCE = 2**16  # members made Python objects at once


class Numbers(ReadWhenAsked[int]):
    """Whole numbers of 64 bits, 8 bytes each; a list of them takes 36.

    Args:
        values: int64 ``[n]``.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def at(self, position: int) -> int:
        return int(self.values[position])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self.values[start : start + _AT_ONCE].tolist()

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # as of lists

    def __repr__(self) -> str:
        return repr(list(self))


def compact(values: Iterable[Any]) -> Sequence[Any]:
    """`Numbers` where all are whole numbers of 64 bits, else a list."""
    numbers, rest = array("q"), iter(values)
    for value in rest:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            return [*numbers, value, *rest]
        numbers.append(value)
    return Numbers(np.frombuffer(numbers, np.int64))
