"""Which part of a store goes into another form: its pictures, texts and columns; and its pictures one by one with their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.bars import Bar
from data_tools.columns import EVERYTHING, Where
from data_tools.errors import DataFault
from data_tools.pictures import read_header
from data_tools.store import Id, Pair, PairSource
from data_tools.store.layouts import Value

ENDING_OF = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "AVIF": "avif",
}


@dataclass(frozen=True)
class Selection:
    """Which part of a store: pictures whose kept columns meet `where`, texts of these `languages` (none: all), columns kept."""

    where: Where = EVERYTHING
    languages: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None

    @property
    def whole(self) -> bool:
        return not self.where and not self.languages

    def keeps(self, store: PairSource, image_id: Id) -> bool:
        return not self.where or self.where.holds(store.columns_of(image_id))

    def keeps_pair(self, pair: Pair) -> bool:
        return not self.languages or pair.language in self.languages

    def pictures(self, store: PairSource, with_text: bool) -> list[Id]:
        """The chosen pictures in stored order; `with_text`: those alone that a chosen text stands on."""
        found = [image_id for image_id in store.image_ids if self.keeps(store, image_id)]
        if not with_text:
            return found
        told = {pair.image_id for pair in store.pairs() if self.keeps_pair(pair)}
        return [image_id for image_id in found if image_id in told]

    def names(self, store: PairSource) -> list[str]:
        """Of the columns that go along."""
        return store.columns if self.columns is None else list(self.columns)

    def columns_of(self, store: PairSource, image_id: Id) -> dict[str, Value]:
        found = store.columns_of(image_id)
        return found if self.columns is None else {name: found[name] for name in self.columns if name in found}


@dataclass(frozen=True)
class Picture:
    """A picture with its texts, as the forms write it."""

    number: int
    image_id: Id
    data: bytes
    ending: str
    texts: list[Pair]
    columns: dict[str, Value]

    @property
    def key(self) -> str:
        return f"{self.number:09d}"

    @property
    def language(self) -> str | None:
        """Of its texts, where they have one in common."""
        said = {pair.language for pair in self.texts}
        return said.pop() if len(said) == 1 else None

    def about(self) -> dict[str, Any]:
        """Its kept columns, and its language where it has one."""
        return self.columns | ({"language": self.language} if self.language else {})


class Pictures:
    """The chosen pictures that have a text, in stored order, with their texts."""

    def __init__(self, store: PairSource, chosen: Selection, progress: bool) -> None:
        self.store, self.chosen, self.progress = store, chosen, progress
        found = chosen.pictures(store, False)
        numbers = {image_id: number for number, image_id in enumerate(found)}
        owners = np.full(len(store), -1, np.int64)
        for place, pair in enumerate(store.pairs()):
            if chosen.keeps_pair(pair):
                owners[place] = numbers.get(pair.image_id, -1)
        told, counts = np.unique(owners[owners >= 0], return_counts=True)
        self.pairs = int(counts.sum())
        self._order = np.argsort(owners, kind="stable")[len(owners) - self.pairs :]
        self._starts = np.concatenate([[0], counts.cumsum()])
        self.ids = [found[number] for number in told.tolist()]
        self.without = len(found) - len(self.ids)  # chosen, but no chosen text stands on them
        self.single = self.pairs == len(self.ids)  # one text each

    def __iter__(self) -> Iterator[Picture]:
        store = self.store
        bar = Bar(self.ids, desc="writing", unit="image", shown=self.progress, delay=1.0)
        for number, image_id in enumerate(bar):
            own = self._order[self._starts[number] : self._starts[number + 1]]
            data = store.image(image_id)
            try:
                ending = ENDING_OF.get(read_header(data).format, "jpg")
            except DataFault as fault:
                raise DataFault(
                    fault.problem,
                    mend="Build the store again without it: --on-error skip.",
                    kind=fault.kind,
                    file=store.path,
                    item_id=image_id,
                ) from None
            texts = [store[int(pair)] for pair in own]
            yield Picture(number, image_id, data, ending, texts, self.chosen.columns_of(store, image_id))
