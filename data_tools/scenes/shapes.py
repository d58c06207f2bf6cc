"""One painter a shape: `painter(canvas, x, y, radius, colour)` in pixels, filled with the colour, edged with a darker one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from PIL import ImageDraw

from data_tools.scenes.vocabulary import RGB

Painter = Callable[[ImageDraw.ImageDraw, float, float, float, RGB], None]


def _mix(colour: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _darker(colour: RGB) -> RGB:
    # Black cannot get darker: its edge is grey.
    return (95, 95, 100) if sum(colour) < 200 else _mix(colour, (0, 0, 0), 0.4)


def _edge(radius: float) -> int:
    return max(2, round(radius * 0.09))


def _polygon(canvas: ImageDraw.ImageDraw, points: Iterable[tuple[float, float]], colour: RGB, radius: float) -> None:
    canvas.polygon(list(points), fill=colour, outline=_darker(colour), width=_edge(radius))


def _disc(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: RGB) -> None:
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _circle(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=_darker(colour), width=_edge(r))


def _square(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    s = 0.88 * r
    canvas.rectangle((x - s, y - s, x + s, y + s), fill=colour, outline=_darker(colour), width=_edge(r))


def _triangle(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    _polygon(canvas, [(x, y - r), (x + r, y + 0.78 * r), (x - r, y + 0.78 * r)], colour, r)


def _star(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    points = []
    for k in range(10):
        reach, angle = (1.12 if k % 2 == 0 else 0.47) * r, -math.pi / 2 + k * math.pi / 5
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    _polygon(canvas, points, colour, r)


def _heart(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    points = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + across * r / 16, y - up * r / 16))
    _polygon(canvas, points, colour, r)


def _moon(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    outer = [math.radians(a) for a in range(50, 311, 10)]
    points = [(x + 0.2 * r + r * math.cos(a), y + r * math.sin(a)) for a in outer]
    # The inner arc runs back between the same two horns, bent less.
    top, bottom = points[-1], points[0]
    for k in range(1, 20):
        a = math.pi * k / 20
        depth = 0.78 * r * math.sin(a)
        points.append((top[0] - depth, (top[1] + bottom[1]) / 2 - (bottom[1] - top[1]) / 2 * math.cos(a)))
    _polygon(canvas, points, colour, r)


def _flower(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    petal = 0.44 * r
    centres = [(x + 0.6 * r * math.cos(a), y + 0.6 * r * math.sin(a)) for a in (2 * math.pi * k / 6 for k in range(6))]
    for px, py in centres:
        _circle(canvas, px, py, petal, colour)
    _disc(canvas, x, y, 0.5 * r, colour)
    _disc(canvas, x, y, 0.26 * r, (255, 236, 150) if colour[0] + colour[1] < 420 else (150, 84, 30))


def _fish(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    tail = [(x + 0.45 * r, y), (x + 1.1 * r, y - 0.55 * r), (x + 1.1 * r, y + 0.55 * r)]
    _polygon(canvas, tail, colour, r)
    box = (x - 1.1 * r, y - 0.6 * r, x + 0.65 * r, y + 0.6 * r)
    canvas.ellipse(box, fill=colour, outline=_darker(colour), width=_edge(r))
    _disc(canvas, x - 0.65 * r, y - 0.14 * r, 0.17 * r, (255, 255, 255))
    _disc(canvas, x - 0.68 * r, y - 0.14 * r, 0.09 * r, (20, 20, 20))


def _house(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    body = (x - 0.78 * r, y - 0.15 * r, x + 0.78 * r, y + 0.95 * r)
    canvas.rectangle(body, fill=colour, outline=_darker(colour), width=_edge(r))
    _polygon(
        canvas, [(x, y - r), (x + 1.05 * r, y - 0.1 * r), (x - 1.05 * r, y - 0.1 * r)], _mix(colour, (0, 0, 0), 0.18), r
    )
    opening = (255, 246, 205) if sum(colour) < 690 else (120, 130, 150)
    canvas.rectangle((x - 0.16 * r, y + 0.38 * r, x + 0.2 * r, y + 0.92 * r), fill=opening)
    canvas.rectangle((x - 0.56 * r, y + 0.14 * r, x - 0.28 * r, y + 0.42 * r), fill=opening)


def _umbrella(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: RGB) -> None:
    stick, width = (92, 78, 70), max(2, round(0.13 * r))
    canvas.line((x, y, x, y + 0.85 * r), fill=stick, width=width)
    canvas.arc((x - 0.36 * r, y + 0.65 * r, x + width / 2, y + 1.05 * r), 0, 180, fill=stick, width=width)
    top, bottom = y - 0.95 * r, y + 0.1 * r
    dome = [
        (x + 1.1 * r * math.cos(a), bottom - (bottom - top) * math.sin(a))
        for a in (math.pi * k / 20 for k in range(21))
    ]
    for k in range(1, 4):  # scalloped lower edge, from left to right
        dome.append((x - 1.1 * r + 2.2 * r * (k - 0.5) / 3, bottom - 0.16 * r))
        if k < 3:
            dome.append((x - 1.1 * r + 2.2 * r * k / 3, bottom))
    _polygon(canvas, dome, colour, r)
    for share in (-1 / 3, 1 / 3):
        canvas.line((x, top, x + 1.1 * r * share, bottom), fill=_darker(colour), width=max(1, _edge(r) // 2))


SHAPE_PAINTERS: dict[str, Painter] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "flower": _flower,
    "fish": _fish,
    "house": _house,
    "umbrella": _umbrella,
}
