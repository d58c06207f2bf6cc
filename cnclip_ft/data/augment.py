"""Augmentation of a whole uint8 batch on its device: random resized crop, colour, random operations or AutoAugment's.

No mirroring unless asked for, since it would mirror the writing in pictures, which captions speak of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cnclip_ft.data.auto_augment import auto_augment, crop_boxes, fill_of, resized_crops
from cnclip_ft.data.rand_augment import grey_of, rand_augment
from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.runtime import to_device


def augment(
    pixels: torch.Tensor,
    setting: Augmentation,
    generator: torch.Generator | None = None,
    preprocessing: Preprocessing | None = None,
) -> torch.Tensor:
    """uint8 ``[n, 3, s, s]`` → uint8 of the same shape, or of the setting's `size`; every picture drawn on its own.

    Args:
        generator: a CPU generator (None: torch's own), so that a device does not change what is drawn.
        preprocessing: the tower's; its mean is what AutoAugment fills with (None: that of CLIP).
    """
    if not setting.changes:
        return pixels
    if setting.auto_augment:
        pixels = _cropped_as_timm(pixels, setting, generator)
        if setting.colour:
            pixels = _whole(_coloured(pixels.float(), setting.colour, torch.rand(len(pixels), 3, generator=generator)))
        return auto_augment(pixels, fill_of(preprocessing), generator)
    draw = torch.rand(len(pixels), 9, generator=generator)
    x = pixels.float()
    if setting.crop < 1 or setting.mirror:
        x = _cropped(x, setting, to_device(draw, x.device))
    if setting.colour:
        x = _coloured(x, setting.colour, draw[:, 5:8])
    x = _whole(x)
    return rand_augment(x, setting.operations, setting.strength, generator) if setting.operations else x


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(0, 255).round_().to(torch.uint8)


def _cropped_as_timm(pixels: torch.Tensor, setting: Augmentation, generator: torch.Generator | None) -> torch.Tensor:
    n, side = len(pixels), pixels.shape[-1]
    mirrored = torch.rand(n, generator=generator) < (0.5 if setting.mirror else 0)
    if setting.crop == 1 and not setting.mirror:
        return pixels
    return resized_crops(pixels, crop_boxes(n, side, setting.crop, generator), mirrored)


def _cropped(x: torch.Tensor, setting: Augmentation, draw: torch.Tensor) -> torch.Tensor:
    """Float ``[n, 3, s, s]``, of the setting's `size` where it has one. It stays beside timm's, so that stopped runs and cached features go on as they began."""
    area = setting.crop + (1 - setting.crop) * draw[:, 0]
    # Aspect 3/4 … 4/3, evenly in the logarithm; sides stay within the picture.
    ratio = torch.exp((draw[:, 1] * 2 - 1) * 0.2876820724517809) if setting.crop < 1 else torch.ones_like(area)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (draw[:, 2] * 2 - 1) * (1 - width), (draw[:, 3] * 2 - 1) * (1 - height)
    if setting.mirror:
        theta[:, 0, 0] *= torch.where(draw[:, 4] < 0.5, -1.0, 1.0)
    side = setting.size or x.shape[-1]
    grid = F.affine_grid(theta, [*x.shape[:2], side, side], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _coloured(x: torch.Tensor, strength: float, draw: torch.Tensor) -> torch.Tensor:
    """`draw` is of 0 … 1, ``[n, 3]``: brightness, contrast, saturation."""
    brightness, contrast, saturation = (1 + strength * (to_device(draw, x.device) * 2 - 1)).T[..., None, None, None]
    x = x * brightness
    grey = grey_of(x)
    x = grey + (x - grey) * saturation
    mean = grey.mean((2, 3), keepdim=True)
    return mean + (x - mean) * contrast
