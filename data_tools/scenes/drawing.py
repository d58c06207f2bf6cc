"""Scene → picture. Everything is drawn three times as large and averaged down, so that edges are smooth."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from data_tools.scenes.backgrounds import BACKGROUND_PAINTERS
from data_tools.scenes.shapes import SHAPE_PAINTERS
from data_tools.scenes.vocabulary import COLOURS, CORNERS, RGB, SIZES, Group, Scene

SUPERSAMPLING = 3
Place = tuple[float, float]
Box = list[float]  # x, y, width, height in shares of the picture


def draw(scene: Scene, size: int = 96) -> Image.Image:
    """The picture of a scene, RGB, `size` × `size` pixels; the same pixels every time."""
    return _drawn(scene, size)[0].reduce(SUPERSAMPLING)


def draw_with_boxes(scene: Scene, size: int = 96) -> tuple[Image.Image, list[tuple[Group, Box]]]:
    """The same picture, and every thing in it: its group, and the smallest box around all of it that lies in the picture."""
    image, things = _drawn(scene, size)
    found = []
    for group, x, y, radius, colour in things:
        alone = Image.new("RGB", image.size)
        SHAPE_PAINTERS[group.shape](ImageDraw.Draw(alone), x, y, radius, colour)
        left, top, right, bottom = (edge / image.width for edge in alone.getbbox() or (0, 0, 0, 0))
        found.append((group, [round(edge, 5) for edge in (left, top, right - left, bottom - top)]))
    return image.reduce(SUPERSAMPLING), found


def _drawn(scene: Scene, size: int) -> tuple[Image.Image, list[tuple[Group, float, float, float, RGB]]]:
    """The picture in its large size, and the things in it: group, centre and radius in pixels, colour."""
    random = Random(f"{scene.seed}/picture")
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(image)
    BACKGROUND_PAINTERS[scene.background](canvas, side, random)
    things = []
    for group, places, radius in _layout(scene, random):
        colour = _shade(COLOURS[group.colour], random)
        for x, y in places:
            thing = group, x * side, y * side, radius * side * random.uniform(0.95, 1.05), colour
            SHAPE_PAINTERS[group.shape](canvas, *thing[1:])
            things.append(thing)
    return image, things


def _shade(colour: RGB, random: Random) -> RGB:
    lighter = random.randint(-9, 9)
    red, green, blue = (min(255, max(0, channel + lighter + random.randint(-4, 4))) for channel in colour)
    return red, green, blue


def _layout(scene: Scene, random: Random) -> list[tuple[Group, list[Place], float]]:
    """Every group with the places of its things and their radius, all as shares of the side; the last lies on top."""
    first, second, radius = scene.first, scene.second, SIZES[scene.first.size]

    def near(x: float, y: float, by: float = 0.035) -> Place:
        return x + random.uniform(-by, by), y + random.uniform(-by, by)

    if second is None:
        if scene.layout in CORNERS:
            return [(first, [near(*CORNERS[scene.layout])], radius)]
        places = [near(x, y, 0.012) for x, y in _arrange(scene.layout, first.count, random)]
        return [(first, places, min(radius, 0.125 if first.count < 5 else 0.105))]

    outer = SIZES[second.size]
    if scene.layout == "inside":
        x, y = near(0.5, 0.5, 0.09)
        return [(second, [(x, y)], 0.38), (first, [(x, y)], radius * 1.1)]
    if scene.layout == "between":
        x, y = near(0.5, 0.5)
        return [(second, [near(0.16, y, 0.02), near(0.84, y, 0.02)], outer), (first, [(x, y)], min(radius, 0.175))]
    if scene.layout == "around":
        x, y = near(0.5, 0.5, 0.02)
        return [(second, _ring(second.count, x, y, 0.37, random), outer), (first, [(x, y)], min(radius, 0.2))]
    placed = []
    for group, along in ((first, 0.26), (second, 0.74)):
        if scene.layout in ("left", "above"):
            # Several things of a group stand side by side across the direction of the relation.
            reach, across = SIZES[group.size], random.uniform(0.42, 0.58) if group.count < 3 else 0.5
            places = [near(along, across + offset, 0.02) for offset in _abreast(group.count, reach)]
            places = places if scene.layout == "left" else [(y, x) for x, y in places]
        else:
            # One above the other in opposite corners; each group is a row that keeps to its half.
            reach = min(SIZES[group.size], 0.19 if group.count == 1 else 0.115)
            x, y = near(along if scene.layout == "upper left" else 1 - along, along, 0.015)
            places = [(x + offset, y) for offset in _abreast(group.count, reach)]
        placed.append((group, places, reach))
    return placed


def _abreast(count: int, radius: float) -> list[float]:
    """Offsets of the centres of `count` things next to each other."""
    return [(k - (count - 1) / 2) * (2 * radius + 0.03) for k in range(count)]


def _arrange(arrangement: str, count: int, random: Random) -> list[Place]:
    if arrangement == "ring":
        return _ring(count, 0.5, 0.5, 0.31, random)
    if arrangement in ("row", "column"):
        step, across = min(0.28, 0.74 / (count - 1)), random.uniform(0.3, 0.7)
        along = [0.5 + (k - (count - 1) / 2) * step for k in range(count)]
        return [(a, across) if arrangement == "row" else (across, a) for a in along]
    # Scattered: apart from each other and neither in a row nor in a column.
    while True:
        places = [(random.uniform(0.14, 0.86), random.uniform(0.14, 0.86)) for _ in range(count)]
        apart = all(math.dist(p, q) > 0.29 for i, p in enumerate(places) for q in places[:i])
        spread = all(max(p[axis] for p in places) - min(p[axis] for p in places) > 0.25 for axis in (0, 1))
        if apart and spread:
            return places


def _ring(count: int, x: float, y: float, radius: float, random: Random) -> list[Place]:
    turn = random.uniform(0, 2 * math.pi)
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
