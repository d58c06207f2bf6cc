"""What a source of pairs promises to whoever trains on it, encodes, checks or searches it: a store, or shards as they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import DataFault
from data_tools.store.beside import Beside
from data_tools.store.layouts import Id, Value


@dataclass(frozen=True, slots=True)
class Pair:
    """One text on one image; a text on two images makes two pairs."""

    image_id: Id
    text_id: Id
    text: str
    language: str | None = None  # "zh" | "en" | "mixed", where known


class PairSource(Protocol):
    """Pairs by number, pictures by id. It may be sent to workers and held across a fork; each process opens its own files.

    What was opened once stays what is read: another process that finds something else at `path` refuses it.

    Attributes:
        path: where it lies. name: what it is called in messages and in what is written.
    """

    path: Path
    name: str

    def __len__(self) -> int:
        """Pairs."""
        ...

    def __getitem__(self, index: int) -> Pair:
        """Pair number `index`, from 0.

        Raises:
            IndexError: no pair of this number.
            DataFault: it is damaged.
        """
        ...

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order, read in one sweep.

        Raises:
            DataFault: a pair is damaged or missing; it is named.
        """
        ...

    def fields(self, start: int, stop: int) -> Sequence[Sequence[Any]]:
        """``image_id, text_id, text, language`` of pairs `start` … `stop` − 1, for who reads millions and wants no object of each.

        Raises:
            DataFault: a pair is damaged or missing; it is named.
        """
        pairs = map(self.__getitem__, range(start, stop))
        return [(pair.image_id, pair.text_id, pair.text, pair.language) for pair in pairs]

    @property
    def beside_counts(self) -> dict[str, int]:
        """How many ``pairs`` have something beside their text, and how many ``boxes``, ``negatives``, a ``weight``; empty: none has."""
        ...

    def beside(self, index: int) -> Beside:
        """What pair `index` has beside its text, any of ``boxes``, ``negatives``, ``weight``; empty where it has nothing.

        ``boxes``: lists ``[x, y, width, height]`` in shares of the upright picture, x and y the upper left corner;
        ``negatives``: texts; ``weight``: a number above 0 (docs/store-format.md).

        Raises:
            IndexError: no pair of this number.
            DataFault: the record is damaged.
        """
        ...

    def all_beside(self) -> Iterator[tuple[int, Beside]]:
        """(number of the pair, what it has beside its text) of the pairs that have anything, in order, read in one sweep."""
        ...

    def pairs_and_beside(self) -> Iterator[tuple[Pair, Beside]]:
        """Every pair with what it has beside its text, in order, read in one sweep."""
        records = self.all_beside()
        following = next(records, None)
        for number, pair in enumerate(self.pairs()):
            if following is not None and following[0] == number:
                yield pair, following[1]
                following = next(records, None)
            else:
                yield pair, {}

    @property
    def image_ids(self) -> Sequence[Id]:
        """Every image in stored order (numbers first, ascending, then words by their UTF-8), also those no text speaks of.

        It need not be a list: an id may be read when its position is asked for.
        """
        ...

    @property
    def image_count(self) -> int:
        """Images as the source says; ``len(image_ids)`` counts them."""
        ...

    def image(self, image_id: Id) -> bytes:
        """The encoded image file.

        Raises:
            KeyError: no image of this id.
        """
        return bytes(self.image_view(image_id))

    def image_view(self, image_id: Id) -> bytes | memoryview:
        """The encoded image file as it lies there, not copied where that can be: not to be kept after `close`.

        Raises:
            KeyError: no image of this id.
        """
        ...

    def __contains__(self, image_id: Id) -> bool:
        """Whether there is an image of this id."""
        ...

    @property
    def columns(self) -> list[str]:
        """Names of the columns kept with images, in the order in which they were met; none where nothing was kept."""
        ...

    def columns_of(self, image_id: Id) -> dict[str, Value]:
        """What is kept of an image beside its texts: column → value; empty where nothing is.

        Raises:
            DataFault: it is damaged.
        """
        ...

    @property
    def lone_texts(self) -> list[tuple[Id, str, str | None]]:
        """Texts no image is known for: (text_id, text, language)."""
        ...

    def texts(self) -> Iterator[tuple[Id | None, Id, str]]:
        """(image_id, text_id, text) of every pair, then of texts without an image (image_id None)."""
        for pair in self.pairs():
            yield pair.image_id, pair.text_id, pair.text
        for text_id, text, _ in self.lone_texts:
            yield None, text_id, text

    def missing_image(self, pair: Pair) -> DataFault:
        """For whoever meets a pair whose image is not among `image_ids`."""
        return DataFault(
            f"text {pair.text_id!r} names image {pair.image_id!r}, which the store does not hold",
            mend="Build the store again from complete source files.",
            kind="missing-image",
            file=self.path,
            item_id=pair.text_id,
        )

    def checksum(self) -> str:
        """sha256 over all images and pairs, hex: the same in any layout, order or number of shards."""
        ...

    def order(self) -> str:
        """sha256 over the order of all images and pairs, hex.

        Equal `checksum` and `order` mean: image and pair of any number are the same.
        """
        ...

    @property
    def stated_checksum(self) -> str | None:
        """The checksum it was finished with, not looked at again; None where none is kept."""
        ...

    @property
    def stated_order(self) -> str | None:
        """The same of its order."""
        ...

    def left_out(self) -> Iterator[dict[str, Any]]:
        """What of its source gave no picture or no pair, as `DataFault.as_dict` has it."""
        ...

    @property
    def faults(self) -> dict[str, int]:
        """Kind → how many give no picture or no pair, of a source that is read as it lies; of a store the import has told."""
        return {}

    def faults_in_words(self) -> str:
        """How many of what, and the first of them; "" where there is none."""
        return ""

    @property
    def notes(self) -> list[str]:
        """What is to be known before training from it."""
        return []

    @property
    def generation(self) -> str:
        """32 hex digits that tell this build of it from any other; quick to find, equal for a copy elsewhere."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What it says of itself: ``pairs``, ``images`` and what else a store's `meta` record has (docs/store-format.md)."""
        ...

    @property
    def layout(self) -> str:
        """In which form the pairs lie: ``plain`` or ``official`` for a store."""
        ...

    def close(self) -> None:
        """Close this process's files."""
        ...
