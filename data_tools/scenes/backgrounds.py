"""One painter a background: `painter(canvas, side, random)` fills the whole square."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from PIL import ImageDraw

from data_tools.scenes.vocabulary import RGB

Painter = Callable[[ImageDraw.ImageDraw, int, Random], None]


def _gradient(canvas: ImageDraw.ImageDraw, side: int, top: RGB, bottom: RGB, random: Random) -> None:
    shift = random.randint(-6, 6)
    band = 3
    for y in range(0, side, band):
        share = y / side
        colour = tuple(max(0, min(255, round(a + (b - a) * share) + shift)) for a, b in zip(top, bottom, strict=True))
        canvas.rectangle((0, y, side, y + band), fill=colour)


def _specks(
    canvas: ImageDraw.ImageDraw, side: int, random: Random, count: int, colours: tuple[RGB, ...], size: float
) -> None:
    for _ in range(count):
        x, y, r = random.uniform(0, side), random.uniform(0, side), side * size * random.uniform(0.5, 1.2)
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=random.choice(colours))


def _grass(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (176, 222, 128), (130, 190, 84), random)
    for _ in range(70):
        x, y, height = random.uniform(0, side), random.uniform(0, side), side * random.uniform(0.025, 0.05)
        canvas.line((x, y, x + random.uniform(-0.4, 0.4) * height, y - height), fill=(98, 160, 62), width=2)


def _night(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (24, 28, 74), (66, 62, 122), random)
    _specks(canvas, side, random, 36, ((255, 250, 220), (205, 214, 255)), 0.006)


def _snow(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (214, 228, 242), (238, 244, 250), random)
    for _ in range(5):
        x, y, r = random.uniform(0, side), random.uniform(0.2 * side, side), side * random.uniform(0.15, 0.3)
        canvas.ellipse((x - r, y, x + r, y + r), fill=(226, 236, 247))
    _specks(canvas, side, random, 40, ((255, 255, 255), (196, 212, 232)), 0.01)


def _sea(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (146, 212, 236), (84, 170, 214), random)
    for _ in range(24):
        x, y, w = random.uniform(-0.05, 1) * side, random.uniform(0, side), side * random.uniform(0.05, 0.09)
        for k in range(2):
            canvas.arc((x + k * w, y, x + (k + 1) * w, y + 0.6 * w), 0, 180, fill=(208, 240, 250), width=3)


def _beach(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (244, 222, 178), (232, 200, 148), random)
    _specks(canvas, side, random, 110, ((206, 170, 116), (252, 240, 212), (190, 152, 104)), 0.006)


def _wall(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    canvas.rectangle((0, 0, side, side), fill=(226, 208, 196))
    rows, columns, gap = 9, 4.5, max(2, side // 100)
    height, width = side / rows, side / columns
    start = random.uniform(0, width)
    for row in range(rows):
        left = -start - (width / 2 if row % 2 else 0)
        while left < side:
            tint = random.randint(-12, 12)
            box = (left + gap, row * height + gap, left + width - gap, (row + 1) * height - gap)
            canvas.rectangle(box, fill=(190 + tint, 116 + tint, 98 + tint))
            left += width


def _paper(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    canvas.rectangle((0, 0, side, side), fill=(252, 251, 244))
    step = side / 10
    start = random.uniform(0, step)
    for k in range(11):
        line = start + k * step
        canvas.line((line, 0, line, side), fill=(178, 206, 232), width=3)
        canvas.line((0, line, side, line), fill=(178, 206, 232), width=3)


def _floor(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    boards = 6
    height = side / boards
    for board in range(boards):
        tint = random.randint(-10, 10)
        top = board * height
        canvas.rectangle((0, top, side, top + height), fill=(196 + tint, 150 + tint, 100 + tint))
        for _ in range(3):
            y, x = top + random.uniform(0.2, 0.8) * height, random.uniform(-0.2, 0.8) * side
            canvas.line(
                (x, y, x + random.uniform(0.2, 0.5) * side, y), fill=(176 + tint, 130 + tint, 82 + tint), width=2
            )
        canvas.line((0, top, side, top), fill=(140, 98, 60), width=3)
        joint = random.uniform(0, side)
        canvas.line((joint, top, joint, top + height), fill=(140, 98, 60), width=3)


def _sunset(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    _gradient(canvas, side, (250, 176, 120), (206, 112, 150), random)
    for _ in range(7):
        x, y, w = random.uniform(-0.1, 0.9) * side, random.uniform(0, side), side * random.uniform(0.15, 0.35)
        canvas.ellipse((x, y, x + w, y + 0.09 * w + 4), fill=(255, 206, 160))


def _pavement(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    canvas.rectangle((0, 0, side, side), fill=(118, 120, 124))
    stones, gap = 4, max(2, side // 110)
    length, start = side / stones, random.uniform(0, side / stones)
    for row in range(stones):
        for column in range(-1, stones + 1):
            x, y, tint = column * length + start * (row % 2), row * length, random.randint(-9, 9)
            box = (x + gap, y + gap, x + length - gap, y + length - gap)
            canvas.rounded_rectangle(box, radius=side // 40, fill=(166 + tint, 168 + tint, 172 + tint))


def _wallpaper(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    canvas.rectangle((0, 0, side, side), fill=(250, 204, 218))
    step, r = side / 7, side * 0.016
    x0, y0 = random.uniform(0, step), random.uniform(0, step)
    for row in range(-1, 8):
        for column in range(-1, 8):
            x, y = x0 + (column + 0.5 * (row % 2)) * step, y0 + row * step
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=(255, 240, 244))


def _blackboard(canvas: ImageDraw.ImageDraw, side: int, random: Random) -> None:
    canvas.rectangle((0, 0, side, side), fill=(44, 78, 68))
    for _ in range(12):  # wiped chalk
        x, y, w = random.uniform(-0.1, 0.9) * side, random.uniform(0, side), side * random.uniform(0.15, 0.4)
        canvas.line((x, y, x + w, y - 0.25 * w), fill=(56, 92, 82), width=max(3, side // 40))
    canvas.rectangle((0, 0, side - 1, side - 1), outline=(150, 106, 66), width=max(3, side // 36))


BACKGROUND_PAINTERS: dict[str, Painter] = {
    "grass": _grass,
    "night": _night,
    "snow": _snow,
    "sea": _sea,
    "beach": _beach,
    "wall": _wall,
    "paper": _paper,
    "floor": _floor,
    "sunset": _sunset,
    "pavement": _pavement,
    "wallpaper": _wallpaper,
    "blackboard": _blackboard,
}
