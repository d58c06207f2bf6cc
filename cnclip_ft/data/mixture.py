"""Several stores read as one: images and texts keep the number of their store, so that ids never meet.

A picture that stands in several stores under one id and with the same bytes (photos with Chinese captions in one store
and English ones in another) is one picture: pairs of it are not negatives of each other, and it is decoded and cached once.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from data_tools.errors import DataFault
from data_tools.store import Pair, PairSource

_ENDS = (
    4096  # bytes compared at both ends of compressed pictures of one size and id: whole ones would be read twice over
)
# JPEG, PNG, WebP: what differs inside changes their length or what stands at their end. Others (BMP, TIFF) are compared whole.
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")


class MixedId(NamedTuple):
    """Id of an image or text: the number of its store, from 0, and its id there."""

    store: int
    id: Any


@dataclass(frozen=True)
class Part:
    """One store of a mixture: visited `weight` times an epoch; `language` is that of texts that do not say theirs."""

    store: PairSource
    weight: float = 1.0
    language: str | None = None


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
    def _images(self) -> dict[MixedId, MixedId]:
        """Every image of every store → the image it is: itself, or the same picture in an earlier store."""
        found: dict[MixedId, MixedId] = {}
        first: dict[Any, list[MixedId]] = {}
        for number, store in enumerate(self.stores):
            for image_id in store.image_ids:
                own = MixedId(number, image_id)
                alike = first.setdefault(image_id, [])
                found[own] = next((other for other in alike if self._same(other, own)), own)
                if found[own] is own:
                    alike.append(own)
        return found

    def _same(self, one: MixedId, other: MixedId) -> bool:
        a, b = (memoryview(self.image_view(each)) for each in (one, other))
        if not (len(a) == len(b) and a[:_ENDS] == b[:_ENDS] and a[-_ENDS:] == b[-_ENDS:]):
            return False
        return bytes(a[:4]).startswith(_COMPRESSED) or a == b

    @cached_property
    def image_ids(self) -> list[MixedId]:
        """Every picture once, in the order of the stores."""
        return [own for own, image in self._images.items() if own is image]

    def pairs(self) -> Iterator[Pair]:
        """Pairs of all stores in order, their ids as `MixedId`, their language said where the recipe says it."""
        for number, part in enumerate(self.parts):
            for pair in part.store.pairs():
                yield self._resolved(number, part, pair)

    def resolved(self, index: int) -> Pair:
        """A pair as `pairs` gives it.

        Raises:
            DataFault: it names an image that is not there.
        """
        number, within = self._place(index)
        part = self.parts[number]
        return self._resolved(number, part, part.store[within])

    def _resolved(self, number: int, part: Part, pair: Pair) -> Pair:
        image = self._images.get(MixedId(number, pair.image_id))
        if image is None:
            raise part.store.missing_image(pair)
        # The fields of a pair are those of its store: here they hold more than a store's ids.
        ids: dict[str, Any] = {"image_id": image, "text_id": MixedId(number, pair.text_id)}
        return replace(pair, **ids, language=pair.language or part.language)

    def missing_image(self, pair: Pair) -> DataFault:
        """As `PairSource` has it; never asked here, `pairs` names the store itself."""
        return self.parts[0].store.missing_image(pair)

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
