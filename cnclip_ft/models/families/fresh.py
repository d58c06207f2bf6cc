"""New towers: their numbers in a recipe, and how their weights start, so that small ones learn within minutes.

The libraries' defaults (a deviation of 0.02 for everything) suit a width of a thousand. In a narrow tower they leave
``[CLS]`` and the class token almost blind to the other tokens, and the first thousand steps are spent on that.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from data_tools.errors import RequestError

Numbers = TypeVar("Numbers")

POSITION_SCALE = 0.3  # beside patch embeddings of about the same size


def keep_scale_(layers: nn.Module) -> None:
    """Every linear layer's weight to a deviation of ``inputs ** -0.5``, so that what passes through keeps its scale."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


def sine_positions_(embedding: nn.Embedding, others: int = 1) -> None:
    """Sine and cosine waves of row and column for the patches of a square, zero for the class token in front.

    They say from the first step which patches are neighbours (arXiv 2205.01580). Kept as they are where the width
    cannot be divided by four.

    Args:
        embedding: weight ``[others + side², width]``.
        others: positions before those of the patches: the class token's, where there is one.
    """
    count, width = embedding.weight.shape
    side = round((count - others) ** 0.5)
    if width % 4 or side * side != count - others:
        return
    frequency = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    place = torch.arange(side, dtype=torch.float32)
    waves = []
    for axis in torch.meshgrid(place, place, indexing="ij"):
        angle = axis.reshape(-1, 1) * frequency
        waves += [angle.sin(), angle.cos()]
    with torch.no_grad():
        embedding.weight.zero_()
        embedding.weight[others:] = torch.cat(waves, dim=1) * POSITION_SCALE


def from_recipe(kind: type[Numbers], found: dict[str, Any], side: str) -> Numbers:
    """The numbers of a new tower, an entry of the catalogue's kind.

    Raises:
        RequestError: a key is missing or not known.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise RequestError(f"model.start.{side}: {str(error).split('__init__() ')[-1]}") from None


def check_new_size(image_size: int, step: int) -> int:
    if image_size % step:
        raise RequestError(f"image_size {image_size} is no multiple of {step}, the new image tower's patch size")
    return image_size
