"""What a source yields: images, texts and faults, in one stream."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import DataFault
from data_tools.pictures import read_file
from data_tools.store import Id
from data_tools.store.layouts import Value, decode_base64


@dataclass(slots=True)
class Base64:
    """An image as base64 text; decoded when it is needed."""

    text: bytes


@dataclass(slots=True)
class ImageItem:
    """An image of the source: its id, where its bytes are, and where it was named.

    `origin` tells the image from others: its file where a source may name it several times (a table with a row per
    caption), else its content (filled in where it is read). With `own_name` the id is only a name of the file: another
    image of that name goes in as ``<name>~<12 digits of its origin>``; else an id given twice is a fault. `columns` are
    kept with it. `ready`: its bytes come out of a store and go in as they are. `place`: the byte of `file` at which they begin,
    where they lie there as they are.
    """

    image_id: Id
    content: bytes | Base64 | Path
    file: Path | str | None = None
    line: int | None = None
    origin: str | None = None
    own_name: bool = False
    columns: dict[str, Value] | None = None
    ready: bool = False
    place: int | None = None

    def __post_init__(self) -> None:
        if self.origin is None and not isinstance(self.content, Path):
            self.origin = content_origin(self.content.text if isinstance(self.content, Base64) else self.content)

    def read(self) -> bytes:
        """The encoded image file.

        Raises:
            DataFault: the file is not there, or its base64 is damaged.
        """
        content = self.content
        if isinstance(content, bytes):
            return content
        if isinstance(content, Base64):
            try:
                return decode_base64(content.text)
            except binascii.Error as error:
                raise self.fault(
                    f"the image is not base64 ({error})", "bad-base64", "Encode the image file again."
                ) from None
        try:
            return read_file(content)
        except DataFault as fault:
            raise self.fault(fault.problem, fault.kind, fault.mend) from None

    def fault(self, problem: str, kind: str, mend: str) -> DataFault:
        return DataFault(problem, mend=mend, kind=kind, file=self.file, line=self.line, item_id=self.image_id)


@dataclass(slots=True)
class TextItem:
    """A text of the source and the images it stands on (none: they are unknown).

    `beside` is what each of its pairs has beside the text (`StoreWriter.add_text`). `origin` is that of its image where both came together: it stands on that image only, not on another of its id. With
    `own_number` the id is only a number counted by the source: behind another source the counting goes on.
    """

    text_id: Id
    text: str
    image_ids: Sequence[Id]
    language: str | None = None
    file: Path | str | None = None
    line: int | None = None
    origin: str | None = None
    own_number: bool = False
    beside: dict[str, Any] | None = None


Item = ImageItem | TextItem | DataFault


def located(fault: DataFault, file: Path | str | None, line: int | None = None, item_id: Id | None = None) -> DataFault:
    """The fault with its place, where it does not know one itself."""
    return DataFault(
        fault.problem,
        mend=fault.mend,
        kind=fault.kind,
        file=fault.file or file,
        line=fault.line or line,
        item_id=item_id if fault.item_id is None else fault.item_id,
    )


@dataclass
class Stream:
    """Items with what a progress bar needs: `tell` counts up to `total` in `unit`; `notes`: what was passed over.

    `counted`: how many numbers texts were given so far, where some of them went to texts that were refused.
    """

    items: Iterator[Item]
    total: int | None = None
    unit: str = "item"
    tell: Callable[[], int] = field(default=lambda: 0)
    notes: list[str] = field(default_factory=list)
    counted: Callable[[], int] = field(default=lambda: 0)


class Source(Protocol):
    """Where pairs come from. Images come before the texts that name them; the order is the same every time."""

    kind: str

    def open(self) -> Stream:
        """The items, from the beginning.

        Raises:
            RequestError: a file of the source is missing.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What the source is, so that an interrupted build can tell whether it is still the same."""
        ...

    def expected(self) -> dict[str, int]:
        """Published counts of `images` and `texts`; empty where there are none."""
        ...


def content_origin(data: bytes) -> str:
    """What tells images apart whose bytes are at hand."""
    return hashlib.sha256(data).hexdigest()


def fingerprint_of(*files: Path) -> list[list[Any]]:
    """Name, size and time of change of every file."""
    return [[str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns] for file in files]
