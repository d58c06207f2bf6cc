"""The pages of an LMDB file, looked at before LMDB does: it believes what it reads, and a damaged page ends the process.

After `walk` nothing LMDB follows on the way to a key or a value leads out of the file. Values themselves are not read
(a picture has pages of its own), so a walk costs the tree alone: some 30 bytes a picture, all of the pairs.

    page   number u64, –, flags u16, end of the pointers u16, begin of the nodes u16; u16 pointers …      free … nodes
    node   size or page below in two u16, flags u16 (or the page's upper third), length of the key u16, key, value
    0, 1   which is valid (the younger transaction): root, depth, entries, last page
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import DataFault, RequestError

_HEAD, _META, _TREE, _LAST = (
    struct.Struct(form) for form in ("=QHHHH", "=IIQQ", "=IHHQQQQQ", "=QQ")
)  # native order, 64 bits, as LMDB
_MAGIC, _NONE = 0xBEEFC0DE, 2**64 - 1
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _DIRTY = 1, 2, 4, 8, 16
_HEAD_BYTES, _NODE_BYTES, _LONGEST_KEY, _DEEPEST = 16, 8, 511, 32
_AT_ONCE = 1024  # pages; some MB
MEND = "Copy it again from where it is whole, or build the store again."


def damaged(file: Path, what: str) -> DataFault:
    """The fault of a file whose pages cannot be followed."""
    return DataFault(f"the file is damaged: {what}", mend=MEND, kind="damaged-store", file=file)


@dataclass
class Tree:
    """The valid state of a file. Pages count from 0; a value of `runs` has pages of its own."""

    file: Path
    page_size: int
    last_page: int
    entries: int
    leaves: np.ndarray  # int64 [n]: pages that hold keys
    runs: np.ndarray  # int64 [m, 3]: first page, pages, position in `leaves` of its key


def _read_head(file: Path) -> tuple[int, int, tuple[int, ...], int]:
    """(bytes, page size, record of the tree, last page)."""
    try:
        with file.open("rb") as handle:
            start = handle.read(2 * 65536)
        size = file.stat().st_size
    except OSError as error:
        raise RequestError(f"{file} cannot be read ({error.strerror}). {MEND}") from None
    first = _META.unpack_from(start, _HEAD_BYTES) if len(start) >= 4096 else (0,)
    if first[0] != _MAGIC:
        what = (
            "empty" if not size else "too short" if size < 4096 else "of another format, or its first page is damaged"
        )
        raise RequestError(f"{file} is not a readable LMDB file (it is {what}). {MEND}")
    page = _TREE.unpack_from(start, _HEAD_BYTES + _META.size)[0]
    if page not in (2**power for power in range(9, 17)):
        raise damaged(file, f"pages of {page} bytes")
    states = []
    for number in (0, 1):
        at = number * page
        if at + 152 > len(start):
            raise damaged(file, "it ends before its second page")
        head, meta = _HEAD.unpack_from(start, at), _META.unpack_from(start, at + _HEAD_BYTES)
        free, tree = (_TREE.unpack_from(start, at + 40 + 48 * which) for which in (0, 1))
        last, transaction = _LAST.unpack_from(start, at + 136)
        if meta[:2] != (_MAGIC, 1) or head[0] != number or head[2] != _META_PAGE or free[0] != page or free[1] & 1:
            raise damaged(file, f"page {number} is none of LMDB's")
        states.append((transaction, tree, last))
    _, tree, last = max(states, key=lambda state: state[0])  # the first of equal ones, as LMDB
    if (last + 1) * page > size:
        raise damaged(file, f"it has {size:,} bytes, {(last + 1) * page:,} are written; it was copied in part")
    return size, page, tree, last


def walk(file: Path) -> Tree:
    """Follow every page from the root to the keys, and where values lie.

    Raises:
        RequestError: it cannot be read, or is no LMDB file.
        DataFault: a page does not hold what it must; it would lead LMDB astray.
    """
    _, size, (_, flags, depth, branches, leaf_count, overflow, entries, root), last = _read_head(file)
    if flags or depth > _DEEPEST or not (2 <= root <= last if depth else root == _NONE):
        raise damaged(file, "the record of its tree is none")
    level = np.array([root] if depth else [], dtype=np.int64)
    pages = np.memmap(file, np.uint8, "r", shape=((last + 1) * size,)).reshape(-1, size)
    found, runs, inner, keys = [level], [np.empty((0, 3), np.int64)], 0, 0
    for height in range(depth, 0, -1):
        below, done = [], 0
        for some in _chunks(level):
            nodes = _Nodes(file, pages, some, _LEAF if height == 1 else _BRANCH, last)
            if height == 1:
                keys += len(nodes.at)
                own = nodes.runs(size)
                own[:, 2] += done
                runs.append(own)
                done += len(some)
            else:
                below.append(nodes.children())
        if height > 1:
            inner += len(level)
            level = np.concatenate(below)
            found.append(level)
    tree = Tree(file, size, last, keys, level, np.concatenate(runs))
    if (inner, len(level), keys, int(tree.runs[:, 1].sum())) != (branches, leaf_count, entries, overflow):
        raise damaged(file, f"{keys:,} of {entries:,} entries can be reached")
    used = np.concatenate([np.concatenate(found), tree.runs[:, 0]])
    ends = np.concatenate([np.concatenate(found), tree.runs[:, 0] + tree.runs[:, 1] - 1])
    order = np.argsort(used)
    if (used[order][1:] <= ends[order][:-1]).any():
        raise damaged(file, "two parts of it lie on the same pages")
    return tree


def _chunks(pages: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pages), _AT_ONCE):
        yield pages[start : start + _AT_ONCE]


class _Nodes:
    """All nodes of some pages of one kind, checked: that they lie where a node may lie."""

    def __init__(self, file: Path, pages: np.ndarray, numbers: np.ndarray, kind: int, last: int) -> None:
        self.file, self.last = file, last
        self.bytes = np.ascontiguousarray(pages[numbers])
        halves = self.bytes.view(np.uint16)
        self.size = self.bytes.shape[1]
        lower, upper = halves[:, 6].astype(np.int64), halves[:, 7].astype(np.int64)
        right = (self.bytes.view(np.uint64)[:, 0] == numbers) & ((halves[:, 5] & ~np.uint16(_DIRTY)) == kind)
        right &= (lower % 2 == 0) & (lower >= _HEAD_BYTES + (2 if kind == _LEAF else 4))
        right &= (lower <= upper) & (upper <= self.size)
        self._require(right, numbers)
        counts = (lower - _HEAD_BYTES) // 2
        self.row = np.repeat(np.arange(len(numbers)), counts)
        number = np.arange(len(self.row)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.at = halves[self.row, _HEAD_BYTES // 2 + number].astype(np.int64)
        right = (self.at % 2 == 0) & (self.at >= upper[self.row]) & (self.at + _NODE_BYTES <= self.size)
        self._require(right, numbers[self.row])
        self.low, self.high, self.flags, key = (
            halves[self.row, self.at // 2 + place].astype(np.int64) for place in range(4)
        )
        self.value = self.at + _NODE_BYTES + key
        own = (self.low | self.high << 16) if kind == _LEAF else np.zeros_like(key)
        self.value_bytes = own
        inside = np.where(self.flags == 1, 8, own) if kind == _LEAF else own
        right = (key <= _LONGEST_KEY) & (self.value + inside <= self.size)
        if kind == _LEAF:
            right &= (self.flags <= 1) & (key > 0)
        self._require(right, numbers[self.row])

    def _require(self, right: np.ndarray, numbers: np.ndarray) -> None:
        if not right.all():
            raise damaged(self.file, f"page {int(numbers[~right][0])} is none of LMDB's")

    def children(self) -> np.ndarray:
        child = self.low | self.high << 16 | self.flags << 32
        self._require((child >= 2) & (child <= self.last), child)
        return child

    def runs(self, size: int) -> np.ndarray:
        """Int64 ``[n, 3]`` of the values that have pages of their own: first page, pages, row of the leaf."""
        apart = np.flatnonzero(self.flags == 1)
        places = self.value[apart, None] + np.arange(8)
        first = np.ascontiguousarray(self.bytes[self.row[apart, None], places]).view(np.uint64).reshape(-1)
        count = -(-(self.value_bytes[apart] + _HEAD_BYTES) // size)
        inside = (first >= 2) & (first <= self.last)
        self._require(inside & (first.astype(np.int64) + count - 1 <= self.last), first)
        return np.stack([first.astype(np.int64), count, self.row[apart]], 1)


def check_runs(tree: Tree) -> None:
    """That the pages of every value say they are; touches each picture, so not done on opening.

    Raises:
        DataFault: one does not.
    """
    pages = np.memmap(tree.file, np.uint8, "r", shape=((tree.last_page + 1) * tree.page_size,)).reshape(
        -1, tree.page_size
    )
    for start in range(0, len(tree.runs), _AT_ONCE):
        runs = tree.runs[start : start + _AT_ONCE]
        heads = np.ascontiguousarray(pages[runs[:, 0], :_HEAD_BYTES])
        right = (heads.view(np.uint64)[:, 0] == runs[:, 0]) & (heads.view(np.uint32)[:, 3] == runs[:, 1])
        right &= (heads.view(np.uint16)[:, 5] & ~np.uint16(_DIRTY)) == _OVERFLOW
        if not right.all():
            raise damaged(tree.file, f"page {int(runs[~right][0, 0])} is none of LMDB's")


def keys_of(tree: Tree, wanted: set[int]) -> list[bytes]:
    """Keys whose own pages are among the pages `wanted`, or that stand on one of them; for pages of a whole tree."""
    pages = np.memmap(tree.file, np.uint8, "r", shape=((tree.last_page + 1) * tree.page_size,)).reshape(
        -1, tree.page_size
    )
    sought = np.array(sorted(wanted), dtype=np.int64)
    touched = np.searchsorted(sought, tree.runs[:, 0]) < np.searchsorted(sought, tree.runs.sum(1) - tree.runs[:, 2])
    found: list[bytes] = []
    leaves = set(tree.runs[touched, 2].tolist()) | set(np.flatnonzero(np.isin(tree.leaves, sought)).tolist())
    starts = {int(first) for first in tree.runs[touched, 0]}
    for leaf in sorted(leaves):
        nodes = _Nodes(tree.file, pages, tree.leaves[leaf : leaf + 1], _LEAF, tree.last_page)
        whole = int(tree.leaves[leaf]) in wanted
        for place, value, flags in zip(nodes.at.tolist(), nodes.value.tolist(), nodes.flags.tolist(), strict=True):
            page = nodes.bytes[0].tobytes()
            own = flags == 1 and int.from_bytes(page[value : value + 8], "little") in starts
            if whole or own:
                found.append(page[place + _NODE_BYTES : value])
    return found
