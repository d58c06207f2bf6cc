"""Which scenes a split holds: random, no two alike, with combinations of colour and shape held out for validation."""

from __future__ import annotations

from random import Random

from data_tools.scenes.vocabulary import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    CORNERS,
    HELD_OUT,
    HOLLOW_ENOUGH,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
)


def sample_scenes(count: int, *, seed: int = 0, held_out: bool = False) -> list[Scene]:
    """`count` different scenes, the same ones for the same arguments; more of them start with the same ones.

    Without `held_out`, no scene shows a combination of `HELD_OUT`; with it, every scene shows at least one.
    """
    scenes: list[Scene] = []
    said: set[tuple[object, ...]] = set()
    part = "valid" if held_out else "train"
    attempt = 0
    while len(scenes) < count:
        scene = _sample(f"{seed}/{part}/{attempt}")
        attempt += 1
        if bool(scene.combinations & HELD_OUT) != held_out:
            continue
        content = (scene.background, scene.layout, scene.first, scene.second)
        if content not in said:
            said.add(content)
            scenes.append(scene)
    return scenes


def _sample(seed: str) -> Scene:
    random = Random(seed)  # from text: the same on every platform and in every run, unlike hash()
    background = random.choice(tuple(BACKGROUNDS))
    layout = random.choices(("one", "several", *RELATIONS), weights=(10, 13, 17, 17, 8, 8, 9, 9, 9))[0]
    if layout == "one":
        first = _group(random, background, count=1)
        return Scene(background, random.choice(tuple(CORNERS)), first, None, seed)
    if layout == "several":
        arrangement = random.choice(ARRANGEMENTS)
        first = _group(
            random, background, count=random.randint(4, 6) if arrangement == "ring" else random.randint(2, 5)
        )
        return Scene(background, arrangement, first, None, seed)
    if layout == "inside":
        first = _group(random, background, count=1, sizes=("small", "medium"))
        # What lies inside is seen against the outer thing, so their colours differ.
        second = _group(random, background, count=1, sizes=("large",), shapes=HOLLOW_ENOUGH, not_colour=first.colour)
        return Scene(background, layout, first, second, seed)
    counts = {"between": (1, 2), "around": (1, random.randint(4, 6))}.get(layout)
    if counts is None:
        counts = random.choice(((1, 1), (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2)))
        if layout.startswith("upper"):
            counts = (min(counts[0], 2), min(counts[1], 2))
    first = _group(random, background, count=counts[0], sizes=("medium", "large") if layout == "around" else None)
    second = first
    while (second.shape, second.colour) == (first.shape, first.colour):
        sizes = {"around": ("small",), "between": ("small", "medium")}.get(layout)
        second = _group(random, background, count=counts[1], sizes=sizes)
    return Scene(background, layout, first, second, seed)


def _group(
    random: Random,
    background: str,
    *,
    count: int,
    sizes: tuple[str, ...] | None = None,
    shapes: tuple[str, ...] = SHAPES,
    not_colour: str | None = None,
) -> Group:
    colours = [c for c in COLOURS if c not in BACKGROUNDS[background] and c != not_colour]
    if sizes is None:
        sizes = ("small", "medium", "large") if count == 1 else ("small", "medium")
    return Group(random.choice(shapes), random.choice(colours), random.choice(sizes), count)
