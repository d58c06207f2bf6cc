"""One pass over a split's pictures: headers, equal content, and whether they decode; decoding in threads."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data_tools.bars import Bar
from data_tools.check.numbers import short_hash
from data_tools.check.words import fault_in_words
from data_tools.errors import DataFault
from data_tools.pictures import PIXEL_LIMIT, Header, decode_check, read_header
from data_tools.store import Id, PairSource
from data_tools.store.checksum import Checksum, Order, image_digest
from data_tools.store.layouts import Value, damaged_value

SHOWN = 12  # examples kept of each kind


class Images:
    """One pass over the pictures: headers, content hashes, and whether they decode."""

    def __init__(self, store: PairSource, decode: bool, workers: int, progress: bool) -> None:
        self.ids, self.bytes, self.undecodable = store.image_ids, 0, 0
        self.numbers = {image_id: number for number, image_id in enumerate(self.ids)}
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.kept: dict[str, Counter[Value]] = {name: Counter() for name in store.columns}
        self.widths: Counter[int] = Counter()
        self.heights: Counter[int] = Counter()
        self.content, self.order = Checksum(), Order()
        self.first: dict[bytes, Id] = {}  # content → the first image that has it
        self.undecodable_examples: list[list[Any]] = []
        self.groups = array("q")  # image number → number of the first image of equal content
        look = _Look(decode)
        bar = Bar(
            total=len(self.ids),
            desc=f"{store.name}: pictures",
            unit="image",
            shown=progress,
            delay=1.0,
        )
        with bar:
            for image_id, size, digest, own, found in _looked_at(store, self.ids, look, workers):
                self.content.add_image(own)
                self.order.image(image_id)
                for name, value in store.columns_of(image_id).items() if self.kept else ():
                    self.kept[name][value] += 1
                self.bytes += size
                self.groups.append(self.numbers[self.first.setdefault(digest, image_id)])
                if isinstance(found, DataFault):
                    self.undecodable += 1
                    if len(self.undecodable_examples) < SHOWN:
                        self.undecodable_examples.append([image_id, fault_in_words(found.kind, found.problem)])
                else:
                    self.formats[found.format] += 1
                    self.modes[found.mode] += 1
                    self.widths[found.width] += 1
                    self.heights[found.height] += 1
                bar.update()
        self._sizes = Counter(self.groups)

    def repeated(self) -> int:
        return sum(count for count in self._sizes.values() if count > 1)

    def repeated_examples(self) -> list[list[Id]]:
        """Ids of equal content, largest groups first."""
        largest = [group for group, count in self._sizes.most_common(SHOWN) if count > 1]
        members: dict[int, list[Id]] = {group: [] for group in largest}
        for number, group in enumerate(self.groups):
            if group in members and len(members[group]) < SHOWN:
                members[group].append(self.ids[number])
        return list(members.values())


class _Look:
    """(id, bytes) → (id, length, hash of the bytes, what the image adds to the checksum, header or what is wrong)."""

    def __init__(self, decode: bool) -> None:
        self._read = decode_check if decode else read_header

    def __call__(self, image_id: Id, data: bytes | DataFault) -> tuple[Id, int, bytes, bytes, Header | DataFault]:
        if isinstance(data, DataFault):
            return image_id, 0, short_hash(repr(image_id).encode()), bytes(32), data
        try:
            found: Header | DataFault = self._read(data, pixel_limit=PIXEL_LIMIT)
        except DataFault as fault:
            found = fault
        return image_id, len(data), short_hash(data), image_digest(image_id, data), found


def _looked_at(
    store: PairSource, ids: Sequence[Id], look: _Look, workers: int
) -> Iterator[tuple[Id, int, bytes, bytes, Header | DataFault]]:
    if workers <= 0:
        for image_id in ids:
            yield look(image_id, _read(store, image_id))
        return
    waiting: deque[Future[tuple[Id, int, bytes, bytes, Header | DataFault]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for image_id in ids:
            waiting.append(pool.submit(look, image_id, _read(store, image_id)))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _read(store: PairSource, image_id: Id) -> bytes | DataFault:
    try:
        return store.image(image_id)
    except DataFault as fault:
        return fault
    except KeyError:
        return damaged_value("its key stands where it is not found", store.path, image_id)
