"""AutoAugment's policy for ImageNet (arXiv 1805.09501) on a uint8 batch, with the crop before it, as timm has them.

It is what `--use-augment` means in the official fine-tuning: timm's ``create_transform(scale=(0.9, 1), auto_augment="original",
interpolation="bicubic")``. Levels, probabilities, fill and rounding are those of timm 1.0 on Pillow, held to it pixel by pixel in
tests/data/test_auto_augment.py. One difference is left: timm cuts out of the picture as it is stored, this out of the square the tower
sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import torch

from cnclip_ft.models.preprocessing import OPENAI_MEAN, SquarePicture
from cnclip_ft.runtime import to_device

ATTEMPTS = 10  # to draw a crop that fits; then the whole square is taken
# (operation, probability, level of 0 … 10) twice; all are equally likely.
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterise", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarise", 0.6, 5), ("auto contrast", 0.6, 5)),
    (("equalise", 0.8, 8), ("equalise", 0.6, 3)),
    (("posterise", 0.6, 7), ("posterise", 0.6, 6)),
    (("equalise", 0.4, 7), ("solarise", 0.2, 4)),
    (("equalise", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarise", 0.6, 3), ("equalise", 0.6, 7)),
    (("posterise", 0.8, 5), ("equalise", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarise", 0.6, 8)),
    (("equalise", 0.6, 8), ("posterise", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalise", 0.6, 2)),
    (("equalise", 0.0, 7), ("equalise", 0.8, 8)),
    (("invert", 0.6, 4), ("equalise", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarise", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear", 0.6, 5), ("equalise", 1.0, 9)),
    (("colour", 0.4, 0), ("equalise", 0.6, 3)),
    (("equalise", 0.4, 7), ("solarise", 0.2, 4)),
    (("solarise", 0.6, 5), ("auto contrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalise", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalise", 0.8, 8), ("equalise", 0.6, 3)),
)
# Pictures uint8 [n, 3, s, s], an amount, the grey levels outside of the picture → pictures.
Operation = Callable[[torch.Tensor, float, tuple[int, ...]], torch.Tensor]
# Level → amount.
AMOUNTS: dict[str, Callable[[int], float]] = {
    "posterise": lambda level: int(level / 10 * 4) + 4,  # bits that are left
    "solarise": lambda level: min(256, int(level / 10 * 256)),  # the first grey level that is inverted
    "rotate": lambda level: level / 10 * 30,  # degrees, either way
    "shear": lambda level: level / 10 * 0.3,  # either way
    "colour": lambda level: level / 10 * 1.8 + 0.1,
    "contrast": lambda level: level / 10 * 1.8 + 0.1,
    "sharpness": lambda level: level / 10 * 1.8 + 0.1,
}
EITHER_WAY = ("rotate", "shear")


def fill_of(preprocessing: object) -> tuple[int, ...]:
    """The grey levels that stand for nothing: the tower's mean, so that they become 0 when normalised."""
    mean = preprocessing.mean if isinstance(preprocessing, SquarePicture) else OPENAI_MEAN
    return tuple(min(255, round(255 * part)) for part in mean)


def crop_boxes(n: int, side: int, smallest: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """int64 ``[n, 4]``: top, left, height and width in whole pixels, of at least the share `smallest` of the area; on the CPU.

    Aspect 3/4 … 4/3, evenly in the logarithm; a box that does not fit is drawn again, and after ten it is the whole square.
    """
    draw = torch.rand(n, ATTEMPTS, 2, generator=generator, dtype=torch.float64)
    area = (smallest + (1 - smallest) * draw[..., 0]) * side**2
    ratio = torch.exp((draw[..., 1] * 2 - 1) * math.log(4 / 3))
    sizes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=2)
    fits = (sizes <= side).all(2)
    first = fits.to(torch.uint8).argmax(1)
    size = torch.where(fits.any(1)[:, None], sizes[torch.arange(n), first], float(side)).long()
    corner = (torch.rand(n, 2, generator=generator, dtype=torch.float64) * (side - size + 1)).long()
    return torch.cat([corner, size], dim=1)


def _weights(start: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """What each of `side` pixels is made of, float32 ``[n, side, side]``: four of the box by Pillow's bicubic (a = −0.5)."""
    centre = (torch.arange(side, dtype=torch.float64) + 0.5) * (length / side).double()[:, None]
    place = (centre - 1.5).floor()[..., None] + torch.arange(4)
    t = (place + 0.5 - centre[..., None]).abs()
    weight = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weight *= (place >= 0) & (place < length[:, None, None]) & (t < 2)  # what lies outside of the box is left out
    index = place.clamp(min=0).minimum(length[:, None, None] - 1) + start[:, None, None]
    whole = torch.zeros(len(start), side, side)  # mostly zeros, and still a third of the time of gathering
    return whole.scatter_add_(2, index.long(), (weight / weight.sum(2, keepdim=True)).float())


def resized_crops(pixels: torch.Tensor, boxes: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 3, s, s]`` → uint8: every picture's box in full size, and the `mirrored` ones turned over; both on the CPU.

    Across, then down, rounded between: as Pillow.
    """
    side = pixels.shape[-1]
    top, left, height, width = boxes.T
    across, down = (_weights(*edge, side) for edge in ((left, width), (top, height)))
    across = torch.where(mirrored[:, None, None], across.flip(1), across)
    x = _rounded(pixels.flatten(1, 2).float() @ to_device(across.transpose(1, 2).contiguous(), pixels.device))
    return _rounded(to_device(down, pixels.device)[:, None] @ x.view(pixels.shape)).to(torch.uint8)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _blend(plain: torch.Tensor, x: torch.Tensor, factor: float) -> torch.Tensor:
    """From `plain` (0) to the picture (1) and beyond; cut off, not rounded."""
    return (plain + factor * (x.float() - plain)).clamp_(0, 255).to(torch.uint8)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """int32 ``[n, 1, s, s]``."""
    red, green, blue = x.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).unsqueeze(1)


def _contrast(x: torch.Tensor, factor: float, _fill: object) -> torch.Tensor:
    total, count = _grey(x).sum((1, 2, 3), keepdim=True, dtype=torch.int64), x.shape[2] * x.shape[3]
    return _blend(((2 * total + count) // (2 * count)).float(), x, factor)


def _sharpness(x: torch.Tensor, factor: float, _fill: object) -> torch.Tensor:
    side, plain, whole = x.shape[-1], x.float(), x.to(torch.int32)
    across = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
    total = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:] + 4 * whole[:, :, 1:-1, 1:-1]
    plain[:, :, 1 : side - 1, 1 : side - 1] = ((2 * total + 13) // 26).float()  # the outermost pixels stay
    return _blend(plain, x, factor)


def _looked_up(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Grey levels through a table ``[n, 3, 256]``."""
    return table.gather(2, x.flatten(2).long()).to(torch.uint8).view_as(x)


def _auto_contrast(x: torch.Tensor, _amount: float, _fill: object) -> torch.Tensor:
    # float64 as Pillow has it, so that a whole number is not cut to the one below; mps has none.
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    low, high = (levels.flatten(2).to(exact) for levels in (x.amin((2, 3), True), x.amax((2, 3), True)))
    every = torch.arange(256, device=x.device).to(exact)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # `255 / x` would multiply by 1 / x
    return _looked_up(x, torch.where(high > low, (every * scale - low * scale).clamp(0, 255).floor(), every))


def _equalise(x: torch.Tensor, _amount: float, _fill: object) -> torch.Tensor:
    levels, every = x.flatten(2).to(torch.int16), torch.arange(256, device=x.device)
    edges = every.to(torch.int16).expand(*levels.shape[:2], 256).contiguous()
    # Counted in a sorted row, as in `rand_augment`. int64 [n, 3, 256]: pixels that are darker than each level.
    darker = torch.searchsorted(levels.sort(2).values, edges)
    step = darker.gather(2, levels.amax(2, keepdim=True).long()) // 255  # of all that are not of the lightest level
    spread = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    return _looked_up(x, torch.where(step > 0, spread, every))


@lru_cache(maxsize=32)
def _places(matrix: tuple[float, ...], side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the pixels of the square come from (float64, so that no edge is met by accident): the pixel at or before, int64
    ``[2, s, s]`` (down, across), how far behind it, float32, and whether it lies within the picture."""
    middle = torch.arange(side, dtype=torch.float64) + 0.5
    a, b, c, d, e, f = matrix
    across = a * middle[None, :] + b * middle[:, None] + c
    down = d * middle[None, :] + e * middle[:, None] + f
    inside = (across >= 0) & (across < side) & (down >= 0) & (down < side)
    places = torch.stack([down, across]) - 0.5
    return places.floor().long(), (places - places.floor()).float(), inside


def _cubic(values: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    """Between the second and the third of four: Pillow's bicubic of transforms (a = −1)."""
    v1, v2, v3, v4 = values
    return v2 + d * (v3 - v1 + d * (2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 - v3 + v4)))


def _moved(x: torch.Tensor, matrix: tuple[float, ...], fill: tuple[int, ...]) -> torch.Tensor:
    side = x.shape[-1]
    before, behind, inside = (to_device(part, x.device) for part in _places(matrix, side))
    columns = x.flatten(2).flatten(0, 1).T.float().contiguous()  # a row is one place of all pictures: copied at once
    rows = []
    for down in range(-1, 3):
        row = (before[0] + down).clamp(0, side - 1) * side
        taps = [(row + (before[1] + across).clamp(0, side - 1)).flatten() for across in range(-1, 3)]
        rows.append(_cubic([columns.index_select(0, tap) for tap in taps], behind[1].view(-1, 1)))
    values = _cubic(rows, behind[0].view(-1, 1)).clamp_(0, 255).to(torch.uint8).T.reshape(x.shape)
    outside = to_device(torch.tensor(fill, dtype=torch.uint8), x.device).view(1, 3, 1, 1)
    return torch.where(inside, values, outside)


def _rotate(x: torch.Tensor, degrees: float, fill: tuple[int, ...]) -> torch.Tensor:
    angle, middle = -math.radians(degrees % 360), x.shape[-1] / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    back = round(-math.sin(angle), 15)
    across, down = (a * -middle + b * -middle + middle for a, b in ((cos, sin), (back, cos)))  # in Pillow's order
    return _moved(x, (cos, sin, across, back, cos, down), fill)


OPERATIONS: dict[str, Operation] = {
    "posterise": lambda x, bits, _fill: x & (256 - 2 ** (8 - int(bits))),
    "solarise": lambda x, level, _fill: torch.where(x < level, x, 255 - x),
    "invert": lambda x, _amount, _fill: 255 - x,
    "auto contrast": _auto_contrast,
    "equalise": _equalise,
    "colour": lambda x, factor, _fill: _blend(_grey(x).float(), x, factor),
    "contrast": _contrast,
    "sharpness": _sharpness,
    "rotate": _rotate,
    "shear": lambda x, amount, fill: _moved(x, (1, amount, 0, 0, 1, 0), fill),
}


@cache
def _steps() -> tuple[list[tuple[str, float]], torch.Tensor, torch.Tensor]:
    """The different operations with their amounts; which of them POLICY has, int64 ``[25, 2]``; and with what probability."""
    amounts = [[(name, AMOUNTS.get(name, float)(level)) for name, _, level in pair] for pair in POLICY]
    steps = sorted({step for pair in amounts for step in pair})
    return (
        steps,
        torch.tensor([[steps.index(step) for step in pair] for pair in amounts]),
        torch.tensor([[probability for _, probability, _ in pair] for pair in POLICY]),
    )


def draw_policy(n: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `n` pictures, on the CPU: the pair of POLICY int64 ``[n]``, which of both is done bool ``[n, 2]``, and which goes the
    other way, bool ``[n, 2]``."""
    pair = torch.randint(len(POLICY), (n,), generator=generator)
    draw = torch.rand(n, 2, 2, generator=generator)
    return pair, draw[..., 0] < _steps()[2][pair], draw[..., 1] < 0.5


def auto_augment(pixels: torch.Tensor, fill: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 ``[n, 3, s, s]`` → uint8, each picture after one pair of operations of the policy.

    Args:
        fill: grey levels of what a rotation or a shear brings in from outside (`fill_of`).
        generator: a CPU generator (None: torch's own), so that a device does not change what is drawn.
    """
    pair, done, back = draw_policy(len(pixels), generator)
    steps, table, _ = _steps()
    x = pixels.clone()
    for turn in range(2):
        wanted = torch.where(done[:, turn], table[pair, turn], -1)
        for number, (name, amount) in enumerate(steps):
            for sign in (False, True) if name in EITHER_WAY else (None,):
                chosen = wanted == number if sign is None else (wanted == number) & (back[:, turn] == sign)
                rows = to_device(chosen.nonzero()[:, 0], x.device)
                if len(rows):
                    x[rows] = OPERATIONS[name](x[rows], -amount if sign else amount, fill)
    return x
