"""What a form says of one picture, as it stands there: the common ground of all forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_tools.errors import DataFault

CORNERS, SIDES, CENTRE = "xyxy", "xywh", "cxcywh"  # how the four numbers of a box are meant


@dataclass(slots=True)
class RawBox:
    """Four numbers as they stand (they may be anything), how they are meant, and where they stand.

    Args:
        called: what the file calls it, where it has no lines (``annotation 17``).
    """

    numbers: Any
    form: str = SIDES
    line: int | None = None
    called: str | None = None


@dataclass(slots=True)
class Phrase:
    """(text, language where it is known) in one language or more, all with the same boxes."""

    texts: list[tuple[str, str | None]]
    boxes: list[RawBox]
    line: int | None = None


@dataclass(slots=True)
class Annotated:
    """A picture with its phrases.

    Args:
        image: its name below the folder of pictures. file, line: where it is annotated.
        size: width and height in pixels that the boxes are meant in, where the file says so.
        relative: boxes are shares of the picture.
        content: its bytes, where they stand in the file.
    """

    image: str
    file: Path
    phrases: list[Phrase]
    line: int | None = None
    size: tuple[float, float] | None = None
    relative: bool = False
    content: bytes | None = None


@dataclass
class Notes:
    """What was changed or passed over, counted, each with the first place."""

    counts: dict[str, list[Any]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def add(self, kind: str, place: str) -> None:
        found = self.counts.setdefault(kind, [0, place])
        found[0] += 1

    def lines(self) -> list[str]:
        counted = [
            f"{count:,} {_UNITS[kind][count != 1]} {_NOTES[kind]} (the first: {place})"
            for kind, (count, place) in self.counts.items()
        ]
        return [*counted, *self.said]


_UNITS = {
    **dict.fromkeys(("swapped", "cut", "twice"), ("box", "boxes")),
    "crowd": ("crowd", "crowds"),
    "shape": ("shape", "shapes"),
    "boxless": ("phrase", "phrases"),
    "bare": ("picture", "pictures"),
}
_NOTES = {
    "swapped": "with swapped corners: put right",
    "cut": "beyond the edge of the picture: cut to it",
    "twice": "twice with one phrase: kept once",
    "crowd": "(iscrowd) passed over: the box is around many",
    "shape": "without an area (points, lines) passed over",
    "boxless": "without boxes passed over",
    "bare": "without any phrase passed over",
}


def place_of(file: Path, line: int | None = None, called: str | None = None) -> str:
    """For people: ``a.jsonl:7``, ``instances.json, annotation 17``."""
    return f"{file.name}:{line}" if line else f"{file.name}, {called}" if called else file.name


def size_of(row: dict[str, Any], width: str = "width", height: str = "height") -> tuple[float, float] | None:
    """Two fields, where both are numbers above 0."""
    sides: list[Any] = [row.get(width), row.get(height)]
    numbers = [float(side) for side in sides if type(side) in (int, float) and 0 < side < 1e9]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


class Form(Protocol):
    """One place in one form. `root` is the folder that pictures are named below."""

    @property
    def root(self) -> Path: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def total(self) -> int | None: ...

    def pictures(self, notes: Notes) -> Iterator[Annotated | DataFault]: ...
