"""Several stores read as one: images and texts keep the number of their store, so that ids never meet.

A picture that stands in several stores under one id and with the same bytes (photos with Chinese captions in one store
and English ones in another) is one picture: pairs of it are not negatives of each other, and it is decoded and cached once.
"""

from __future__ import annotations

import hashlib
import shlex
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from cnclip_ft.data.ids import MixedId, Positions
from data_tools.arrays import ReadWhenAsked
from data_tools.errors import DataFault
from data_tools.store import Pair, PairSource

_ENDS = (
    4096  # bytes compared at both ends of compressed pictures of one size and id: whole ones would be read twice over
)
# JPEG, PNG, WebP: what differs inside changes their length or what stands at their end. Others (BMP, TIFF) are compared whole.
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")


@dataclass(frozen=True)
class Part:
    """One store of a mixture: visited `weight` times an epoch; `language` is that of texts that do not say theirs."""

    store: PairSource
    weight: float = 1.0
    language: str | None = None


class _Repeats(ReadWhenAsked[Any]):
    """Ids of a store's pictures that an earlier store has too: 18 bytes for each of them (26 where ids are strings), nothing for the others.

    Args:
        ids: those of the store.
        places: int64 ``[n]``, ascending: where these pictures stand among `ids`.
        firsts: int16 ``[n]``: the number of the store each is of.
    """

    def __init__(self, ids: Sequence[Any], places: np.ndarray, firsts: np.ndarray) -> None:
        self.ids, self.kept = ids, len(ids) - len(places)
        self._before = places - np.arange(len(places))  # pictures kept before each
        self._firsts = firsts
        self._positions = Positions(self)

    def __len__(self) -> int:
        return len(self._before)

    def at(self, position: int) -> Any:
        return self.ids[int(self._before[position]) + position]

    def of(self, image_ids: Sequence[Any]) -> list[int]:
        """The store that had each picture before; -1 where none had."""
        if not len(self):
            return [-1] * len(image_ids)
        at = self._positions.of(image_ids)
        return np.where(at < 0, -1, self._firsts[at]).tolist()

    def place(self, number: int) -> int:
        """Where the `number`-th of the kept pictures stands among `ids`."""
        return number + int(np.searchsorted(self._before, number, side="right"))


class MixedIds(ReadWhenAsked[MixedId]):
    """The ids of a mixture's pictures by their position: those of the stores, less pictures that stand in an earlier one."""

    def __init__(self, stores: Sequence[_Repeats]) -> None:
        self._stores = stores
        self._ends = list(accumulate(store.kept for store in stores))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, position: int) -> MixedId:
        number = bisect_right(self._ends, position)
        store = self._stores[number]
        return MixedId(number, store.ids[store.place(position - self._ends[number] + store.kept)])


class Mixture:
    """What training asks of a `PairSource`, over several; pairs of one store lie behind those of the one before.

    It may be sent to other processes, as its stores may.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    @property
    def stores(self) -> list[PairSource]:
        return [part.store for part in self.parts]

    @property
    def path(self) -> str:
        """All places, for messages."""
        return " + ".join(str(store.path) for store in self.stores)

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    def __getitem__(self, index: int) -> Pair:
        """A pair as it lies in its store, by its ids and language there."""
        number, within = self._place(index)
        return self.stores[number][within]

    def beside(self, index: int) -> dict[str, Any]:
        """What the pair has beside its text, as `PairSource` has it."""
        number, within = self._place(index)
        return self.stores[number].beside(within)

    @property
    def beside_counts(self) -> dict[str, int]:
        """As `PairSource` has it, of all stores together."""
        return dict(sum((Counter(store.beside_counts) for store in self.stores), Counter()))

    def _place(self, index: int) -> tuple[int, int]:
        """The number of its store, and its number there."""
        for number, store in enumerate(self.stores):
            if index < len(store):
                return number, index
            index -= len(store)
        raise IndexError(index)

    @cached_property
    def _repeats(self) -> list[_Repeats]:
        """Of every store, the pictures that are in an earlier one."""
        found: list[_Repeats] = []
        for number, store in enumerate(self.stores):
            places, firsts = array("q"), array("h")
            for place, image_id in enumerate(store.image_ids) if number else ():
                for earlier in range(number):
                    if (
                        image_id in self.stores[earlier]
                        and found[earlier].of([image_id]) == [-1]
                        and self._same(MixedId(earlier, image_id), MixedId(number, image_id))
                    ):
                        places.append(place)
                        firsts.append(earlier)
                        break
            found.append(_Repeats(store.image_ids, np.array(places, np.int64), np.array(firsts, np.int16)))
        return found

    def _same(self, one: MixedId, other: MixedId) -> bool:
        a, b = (memoryview(self.image_view(each)) for each in (one, other))
        if not (len(a) == len(b) and a[:_ENDS] == b[:_ENDS] and a[-_ENDS:] == b[-_ENDS:]):
            return False
        return bytes(a[:4]).startswith(_COMPRESSED) or a == b

    @cached_property
    def image_ids(self) -> MixedIds:
        """Every picture once, in the order of the stores."""
        return MixedIds(self._repeats)

    def pairs(self) -> Iterator[Pair]:
        """Pairs of all stores in order, their ids as `MixedId`, their language said where the recipe says it."""
        for number, part in enumerate(self.parts):
            for pair in part.store.pairs():
                yield self._resolved(number, part, pair)

    def fields(self, start: int, stop: int) -> list[Sequence[Any]]:
        """As `PairSource` has it, of pairs as `resolved` gives them; whether their images are there is not looked up."""
        found: list[Sequence[Any]] = []
        first = 0
        for number, part in enumerate(self.parts):
            one, other = max(start - first, 0), min(stop - first, len(part.store))
            if one < other:
                lying = part.store.fields(one, other)
                images = self._images(number, [fields[0] for fields in lying])
                found += [
                    (image, MixedId(number, text_id), text, language or part.language)
                    for image, (_, text_id, text, language) in zip(images, lying, strict=True)
                ]
            first += len(part.store)
        return found

    def resolved(self, index: int) -> Pair:
        """A pair as `pairs` gives it.

        Raises:
            DataFault: it names an image that is not there.
        """
        number, within = self._place(index)
        part = self.parts[number]
        return self._resolved(number, part, part.store[within])

    def _resolved(self, number: int, part: Part, pair: Pair) -> Pair:
        image = self._images(number, [pair.image_id])[0]
        if image.store == number and pair.image_id not in part.store:
            raise part.store.missing_image(pair)
        # The fields of a pair are those of its store: here they hold more than a store's ids.
        ids: dict[str, Any] = {"image_id": image, "text_id": MixedId(number, pair.text_id)}
        return replace(pair, **ids, language=pair.language or part.language)

    def _images(self, number: int, image_ids: Sequence[Any]) -> list[MixedId]:
        """The pictures that the `number`-th store has under these ids: those of an earlier store, where they are the same."""
        firsts = self._repeats[number].of(image_ids)
        return [
            MixedId(number if first < 0 else first, image_id) for first, image_id in zip(firsts, image_ids, strict=True)
        ]

    def missing_image(self, pair: Pair) -> DataFault:
        """As `PairSource` has it, of a pair as `pairs` gives it."""
        image: Any = pair.image_id
        text: Any = pair.text_id
        return self.parts[image.store].store.missing_image(replace(pair, image_id=image.id, text_id=text.id))

    def image_view(self, image_id: MixedId) -> bytes | memoryview:
        return self.parts[image_id.store].store.image_view(image_id.id)

    def checksum(self) -> str:
        """sha256 over the checksums of the stores, hex."""
        return hashlib.sha256("\n".join(store.checksum() for store in self.stores).encode()).hexdigest()


def name_image(store: PairSource | Mixture, image_id: Any) -> str:
    """Store and image for a message."""
    if isinstance(store, Mixture):
        return name_image(store.stores[image_id.store], image_id.id)
    return f"{store.path}: image {image_id!r}"


def stores_of(store: PairSource | Mixture) -> list[PairSource]:
    return store.stores if isinstance(store, Mixture) else [store]


def check_lines(store: PairSource | Mixture) -> str:
    """The commands that look for what is wrong, to type."""
    return " and ".join(f"`cnclip-ft data check {shlex.quote(str(each.path))}`" for each in stores_of(store))
