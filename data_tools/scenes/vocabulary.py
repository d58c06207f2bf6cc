"""What scenes are made of: shapes, colours, backgrounds, sizes, layouts, and which colour-shape combinations are held out."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "flower", "fish", "house", "umbrella")
HOLLOW_ENOUGH = ("circle", "square", "heart", "flower")  # shapes that another thing fits into

COLOURS: dict[str, RGB] = {
    "red": (220, 38, 42),
    "orange": (247, 138, 28),
    "yellow": (250, 216, 40),
    "green": (38, 156, 66),
    "blue": (36, 98, 222),
    "purple": (136, 54, 184),
    "white": (250, 250, 250),
    "black": (34, 34, 38),
}

# Background → colours that would drown in it.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "grass": ("green",),
    "night": ("black",),
    "snow": ("white",),
    "sea": ("blue",),
    "beach": ("yellow",),
    "wall": ("red", "orange"),
    "paper": ("white",),
    "floor": ("orange",),
    "sunset": ("orange", "red"),
    "pavement": (),
    "wallpaper": (),
    "blackboard": ("black", "green"),
}

# Size → half the width of the thing, as a share of the picture's side.
SIZES = {"small": 0.095, "medium": 0.145, "large": 0.21}

CORNERS = {
    "centre": (0.5, 0.5),
    "top left": (0.24, 0.24),
    "top right": (0.76, 0.24),
    "bottom left": (0.24, 0.76),
    "bottom right": (0.76, 0.76),
}
ARRANGEMENTS = ("row", "column", "ring", "scattered")  # of several equal things
RELATIONS = (
    "left",
    "above",
    "upper left",
    "upper right",
    "inside",
    "between",
    "around",
)  # of the first group to the second


@dataclass(frozen=True, slots=True)
class Group:
    """`count` equal things."""

    shape: str
    colour: str
    size: str
    count: int


@dataclass(frozen=True, slots=True)
class Scene:
    """All there is to say about one picture.

    `layout` is a corner of `CORNERS` (one thing), one of `ARRANGEMENTS` (several equal things) or one of `RELATIONS`:
    `first` is left of / above / at the upper left or right of / inside / between / encircled by `second`. `seed` settles what is not said, such as
    exact places and shades, and the wording of the captions.
    """

    background: str
    layout: str
    first: Group
    second: Group | None
    seed: str

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def combinations(self) -> set[tuple[str, str]]:
        """(colour, shape) of everything in the picture."""
        return {(group.colour, group.shape) for group in self.groups}


def _held_out() -> frozenset[tuple[str, str]]:
    # A slanted lattice over the table: one or two shapes of every colour, one or two colours of every shape.
    return frozenset(
        (colour, shape)
        for i, colour in enumerate(COLOURS)
        for j, shape in enumerate(SHAPES)
        if (3 * i + j) % 7 == 0
    )  # fmt: skip


HELD_OUT = _held_out()
"""(colour, shape) never seen in training; every validation scene shows at least one of them."""


@dataclass(frozen=True, slots=True)
class Told:
    """Which details a caption tells. Shapes are always told, and the colour of at least one group."""

    background: bool = True
    layout: bool = True
    sizes: bool = True
    counts: bool = True
    every_colour: bool = True

    def clause(self, scene: Scene, kinds: Container[str]) -> str:
        """The kind of clause that tells the layout, one of `kinds` or ``corner``; without it, of as many groups."""
        if self.layout:
            return scene.layout if scene.layout in kinds else "corner"
        return "one group" if scene.second is None else "two groups"

    def groups(self, scene: Scene, phrase: Callable[[Group, bool], str]) -> dict[str, str]:
        """What a clause calls ``a`` and ``b``; `phrase` names a group, with its colour or without."""
        words = {"a": phrase(scene.first, True)}
        return words if scene.second is None else words | {"b": phrase(scene.second, self.every_colour)}

    def of(self, scene: Scene) -> tuple[object, ...]:
        """What is told of a scene; two scenes for which this is equal cannot be told apart by the caption."""
        groups = []
        for number, group in enumerate(scene.groups):
            colour = group.colour if self.every_colour or number == 0 else None
            size = group.size if self.sizes and group.size != "medium" else None
            count = group.count if self.counts else min(group.count, 2)
            groups.append((group.shape, colour, size, count))
        layout = scene.layout if self.layout else len(groups)
        ordered = groups if self.layout else sorted(groups, key=repr)
        return (scene.background if self.background else None, layout, *ordered)
