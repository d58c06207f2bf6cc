"""Random operations on a uint8 batch after RandAugment (arXiv 1909.13719): each picture draws its own, all with one strength.

Left out on purpose: mirroring, and what turns colours into others (invert, solarize), since captions speak of both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cnclip_ft.runtime import to_device

_GREY = (0.299, 0.587, 0.114)
# Pictures [n, 3, h, w] and their amounts [n] → pictures.
Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _affine(entries: Callable[[torch.Tensor], dict[tuple[int, int], torch.Tensor]]) -> Operation:
    """An operation that moves pixels; `entries` gives what differs from the identity ``[2, 3]``."""

    def operation(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
        theta = torch.eye(2, 3, device=x.device).repeat(len(x), 1, 1)
        for (row, column), value in entries(amount).items():
            theta[:, row, column] = value
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    return operation


def _turn(amount: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    angle = amount * (torch.pi / 6)
    return {(0, 0): angle.cos(), (0, 1): -angle.sin(), (1, 0): angle.sin(), (1, 1): angle.cos()}


def _blend(reference: Callable[[torch.Tensor], torch.Tensor]) -> Operation:
    """An operation that goes from the picture towards a plainer one (amount < 0) or away from it."""

    def operation(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
        plain = reference(x)
        return plain + (x - plain) * (1 + 0.9 * amount)[:, None, None, None]

    return operation


def grey_of(x: torch.Tensor) -> torch.Tensor:
    """Float ``[n, 3, h, w]`` → ``[n, 1, h, w]``."""
    return (x * to_device(torch.tensor(_GREY), x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _smooth(x: torch.Tensor) -> torch.Tensor:
    kernel = to_device(torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]), x.device).div(13).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _posterise(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    step = (2 ** (amount.abs() * 4).round())[:, None, None, None]  # 8 … 4 bits are left
    return (x / step).floor() * step


def _autocontrast(x: torch.Tensor, _amount: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1)), x)


def _equalise(x: torch.Tensor, _amount: torch.Tensor) -> torch.Tensor:
    """Every channel's grey levels spread evenly over 0 … 255.

    Levels are counted in a sorted row: histograms, `scatter_add` and sums along floats are not deterministic on a card, and torch
    refuses some of them where it was asked to be.
    """
    levels = x.round().clamp(0, 255).to(torch.uint8).flatten(2)
    edges = torch.arange(257, dtype=torch.int16, device=x.device).expand(*levels.shape[:2], 257).contiguous()
    below = torch.searchsorted(
        levels.to(torch.int16).sort(2).values, edges
    ).float()  # of 257 levels: pixels that are darker
    middle = (below[..., :-1] + below[..., 1:]) / 2
    return (middle.gather(2, levels.long()) * (255 / levels.shape[2])).view_as(x)


OPERATIONS: dict[str, Operation] = {
    "turn": _affine(_turn),
    "shear across": _affine(lambda amount: {(0, 1): amount * 0.3}),
    "shear down": _affine(lambda amount: {(1, 0): amount * 0.3}),
    "shift across": _affine(lambda amount: {(0, 2): amount * 0.9}),
    "shift down": _affine(lambda amount: {(1, 2): amount * 0.9}),
    "brightness": _blend(torch.zeros_like),
    "contrast": _blend(lambda x: grey_of(x).mean((2, 3), keepdim=True)),
    "saturation": _blend(grey_of),
    "sharpness": _blend(_smooth),
    "posterise": _posterise,
    "autocontrast": _autocontrast,
    "equalise": _equalise,
}


def rand_augment(
    pixels: torch.Tensor, operations: int, strength: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """uint8 ``[n, 3, s, s]`` → uint8, after so many operations drawn for every picture, each of up to `strength` (0 … 1).

    `generator` is a CPU generator (None: torch's own), so that a device does not change what is drawn.
    """
    which = torch.randint(len(OPERATIONS), (len(pixels), operations), generator=generator)
    amounts = to_device((torch.rand(which.shape, generator=generator) * 2 - 1) * strength, pixels.device)
    x = pixels.float()
    for turn in range(operations):
        for number, operation in enumerate(OPERATIONS.values()):
            rows = to_device((which[:, turn] == number).nonzero()[:, 0], pixels.device)
            if len(rows):
                x[rows] = operation(x[rows], amounts[rows, turn]).clamp(0, 255)
    return x.round_().to(torch.uint8)
