"""Boxes and scores off an image tower's patches: heads beside the towers of a dual encoder (OWL-ViT, arXiv 2205.06230).

A region is a patch's token x with the pooled token g, normalised: ``x · (a + b · g)`` number by number, a and b learnt. It has a box, and for
a phrase the score ``(cosine + shift) · (ELU(scale) + 1)``, with shift and scale of its own; the sigmoid of it is the probability.

The paper's region is x · g, a = 0 and b = 1. Here heads begin with a = 1 and b = 0: the signs of g turn those of x from picture to picture, and
boxes are learnt much slower. To a region is added what the patches around it say (`beside`), so that an edge that lies in the next patch is at hand
(docs/grounding.md has the figures).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import Tokens
from cnclip_ft.models.schema import Part, Width
from data_tools.errors import RequestError

PRIOR = 0.01  # probability that a region without anything learnt gives a phrase it has nothing to do with
_SHARPNESS = 10.0  # of the score, before anything is learnt
_NEVER = -30.0  # the score of what is no patch of the picture


class HeadsPart(Part):
    """What a checkpoint's description says of them."""

    width: Width
    dim: Width


class Regions(NamedTuple):
    """Regions of pictures, float32 (float64 of a model in float64).

    Attributes:
        boxes: ``[n, p, 4]``: (cx, cy, w, h) as shares of what the tower sees.
        places: the same of the patches themselves.
        features: unit ``[n, p, dim]``, compared with a phrase's.
        shift, factor: ``[n, p]``.
        real: bool ``[n, p]``, false for what fills up pictures of fewer patches.
    """

    boxes: torch.Tensor
    places: torch.Tensor
    features: torch.Tensor
    shift: torch.Tensor
    factor: torch.Tensor
    real: torch.Tensor

    def scores(self, phrases: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, p, k]`` of unit features: of phrases all pictures are asked ``[k, dim]``, or each its own ``[n, k, dim]``."""
        cosines = self.features @ phrases.transpose(-1, -2)
        scores = (cosines + self.shift[..., None]) * self.factor[..., None]
        return scores.masked_fill(~self.real[..., None], _NEVER)


class GroundingHeads(nn.Module):
    """Heads for tokens of `width` numbers and phrases of `dim`."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.width, self.dim = width, dim
        self.own, self.times = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)
        self.around, self.beside = nn.Parameter(torch.empty(9, width)), nn.Linear(width, width)
        self.box = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
        )
        self.feature = nn.Linear(width, dim)
        self.shift, self.scale = nn.Linear(width, 1), nn.Linear(width, 1)
        if not self.shift.weight.is_meta:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Boxes begin as the patches' own, and scores at `PRIOR`."""
        for layer in (self.box[-1], self.shift, self.scale):
            assert isinstance(layer, nn.Linear)
            layer.weight.mul_(0.1)
            layer.bias.zero_()
        nn.init.uniform_(self.around, -1 / 3, 1 / 3)  # as a convolution of nine numbers begins
        self.shift.bias.fill_(math.log(PRIOR / (1 - PRIOR)) / _SHARPNESS)
        self.scale.bias.fill_(_SHARPNESS - 1)

    def describe(self) -> dict[str, int]:
        return {"width": self.width, "dim": self.dim}

    def forward(self, tokens: Tokens) -> Regions:
        places, real = patch_places(tokens.grid, tokens.patches.shape[1], tokens.seen)
        merged = self.norm(tokens.patches * (self.own + self.times * tokens.pooled)[:, None])
        merged = merged + self.beside(F.gelu(around(merged, tokens.grid, self.around)))
        inner = 1e-4  # sigmoids do not reach the edge
        boxes = _whole(self.box(merged))
        places = places.to(boxes.dtype)
        boxes = torch.sigmoid(boxes + torch.logit(places, eps=inner))
        features = F.normalize(_whole(self.feature(merged)), dim=-1)
        factor = F.elu(_whole(self.scale(merged))) + 1
        return Regions(boxes, places, features, _whole(self.shift(merged))[..., 0], factor[..., 0], real)


def completed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors, with what its heads did not say when a region was the product alone."""
    norm = tensors.get("heads.norm.weight")
    if norm is None or "heads.own" in tensors:
        return tensors
    width = norm.shape[0]
    return {
        **tensors,
        "heads.own": torch.zeros_like(norm),
        "heads.times": torch.ones_like(norm),
        "heads.around": norm.new_zeros(9, width),
        "heads.beside.weight": norm.new_zeros(width, width),
        "heads.beside.bias": torch.zeros_like(norm),
    }


def _whole(numbers: torch.Tensor) -> torch.Tensor:
    """In fp32 at least, as features are."""
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def around(tokens: torch.Tensor, grid: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The sum of a patch and its eight neighbours, each times its row of `kernel`, ``[n, count, width]``: a depthwise convolution of 3 × 3
    for pictures of any rows and columns.

    Args:
        kernel: ``[9, width]``, row by row.
    """
    count = tokens.shape[1]
    number = torch.arange(count, device=grid.device)
    rows, columns = grid[:, :1], grid[:, 1:]
    row, column = number // columns, number % columns
    total = torch.zeros_like(tokens)
    for place, weight in enumerate(kernel):
        there, beside = row + place // 3 - 1, column + place % 3 - 1
        inside = (there >= 0) & (there < rows) & (beside >= 0) & (beside < columns)
        found = (there * columns + beside).clamp(0, count - 1)
        neighbour = tokens.gather(1, found[..., None].expand_as(tokens))
        total = total + neighbour * (inside[..., None] * weight)
    return total


def patch_places(
    grid: torch.Tensor, count: int, seen: tuple[float, float] = (1.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the patches of pictures lie, row by row: centred boxes ``[n, count, 4]``, and bool ``[n, count]``, false beyond the last one.

    Args:
        grid: int64 ``[n, 2]``, rows and columns of each picture.
        seen: as `models.dense.Tokens` has it.
    """
    number = torch.arange(count, device=grid.device)
    rows, columns = grid[:, :1], grid[:, 1:]
    tall, wide = (seen[0] / rows).expand(-1, count), (seen[1] / columns).expand(-1, count)
    row, column = number // columns, number % columns
    places = torch.stack([(column + 0.5) * wide, (row + 0.5) * tall, wide, tall], dim=2)
    return places, number < rows * columns


def new_heads(tower: ImageTower) -> GroundingHeads:
    """Heads for the patches of this tower, drawn from torch's generator.

    Raises:
        RequestError: it gives none, or none that go with what they are pooled into.
    """
    with torch.no_grad():
        example = tower.example(1)
        dtype = next(tower.parameters()).dtype
        tokens = tower.tokens(tower.preprocessing.normalise(example, dtype))
    width, pooled = tokens.patches.shape[-1], tokens.pooled.shape[-1]
    if width != pooled:
        raise RequestError(
            f"an image tower of kind {tower.kind} gives patches of {width} numbers and pools them into {pooled}: heads for boxes need the same"
        )
    return GroundingHeads(width, tower.output_dim).to(example.device, dtype)
