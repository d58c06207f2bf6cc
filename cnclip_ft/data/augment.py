"""Augmentation of a whole uint8 batch on its device: random resized crop, colour, random operations. No mirroring
unless asked for, since it would mirror the writing in pictures, which captions speak of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cnclip_ft.data.rand_augment import grey_of, rand_augment
from cnclip_ft.recipe import Augmentation
from cnclip_ft.runtime import to_device


def augment(pixels: torch.Tensor, setting: Augmentation, generator: torch.Generator | None = None) -> torch.Tensor:
    """uint8 ``[n, 3, s, s]`` → uint8 of the same shape, every picture drawn on its own.

    `generator` is a CPU generator (None: torch's own), so that a device does not change what is drawn.
    """
    if not setting.changes:
        return pixels
    n = len(pixels)
    draw = to_device(torch.rand(n, 9, generator=generator), pixels.device)
    x = pixels.float()
    if setting.crop < 1 or setting.mirror:
        area = setting.crop + (1 - setting.crop) * draw[:, 0]
        # Aspect 3/4 … 4/3, evenly in the logarithm; sides stay within the picture.
        ratio = torch.exp((draw[:, 1] * 2 - 1) * 0.2876820724517809) if setting.crop < 1 else torch.ones_like(area)
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        theta = torch.zeros(n, 2, 3, device=pixels.device)
        theta[:, 0, 0], theta[:, 1, 1] = width, height
        theta[:, 0, 2], theta[:, 1, 2] = (draw[:, 2] * 2 - 1) * (1 - width), (draw[:, 3] * 2 - 1) * (1 - height)
        if setting.mirror:
            theta[:, 0, 0] *= torch.where(draw[:, 4] < 0.5, -1.0, 1.0)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if setting.colour:
        brightness, contrast, saturation = (1 + setting.colour * (draw[:, 5:8] * 2 - 1)).T[..., None, None, None]
        x = x * brightness
        grey = grey_of(x)
        x = grey + (x - grey) * saturation
        mean = grey.mean((2, 3), keepdim=True)
        x = mean + (x - mean) * contrast
    x = x.clamp_(0, 255).round_().to(torch.uint8)
    return rand_augment(x, setting.operations, setting.strength, generator) if setting.operations else x
