"""SigLIP 2's image tower for pictures in their own shape (NaFlex): transformers' Siglip2VisionModel.

Position embeddings are brought to each picture's grid by antialiased bilinear resampling, as there; here as one product for the
whole batch: a patch's weights are those of its row times those of its column. That knows no loop over pictures and no waiting
for the device, and can be written down as a graph.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from cnclip_ft.models.dense import Patches, Tokens, changed, of_transformers
from cnclip_ft.models.families.numbers import PatchNumbers, unusual_rule, with_picture_rule
from cnclip_ft.models.families.plain_attention import hiding, plain_layers
from cnclip_ft.models.families.siglip.vision import PooledTower
from cnclip_ft.models.patches import BUDGET, PatchedPicture
from cnclip_ft.runtime import to_device
from data_tools.errors import RequestError


class NaflexVision(PatchNumbers):
    kind: Literal["siglip2"]
    num_patches: Annotated[int, Field(ge=1, le=1 << 16)]  # of the grid that has positions: a square
    max_num_patches: Annotated[int, Field(ge=1, le=1 << 14)] = BUDGET  # of a picture
    fit: None = None  # always the picture's own shape

    @model_validator(mode="after")
    def _square(self) -> NaflexVision:
        if round(self.num_patches**0.5) ** 2 != self.num_patches:
            raise ValueError(f"num_patches {self.num_patches} is no square")
        return self


class NaflexTower(PooledTower):
    """Patches in, features out; padding behind a picture's patches is never looked at."""

    kind, schema = "siglip2", NaflexVision
    config_keys = (*PooledTower.config_keys, "num_patches")
    can_be_new = False
    preprocessing: PatchedPicture

    def __init__(self, config: Siglip2VisionConfig, preprocessing: PatchedPicture) -> None:
        super().__init__()
        self._take(Siglip2VisionModel(config))
        self.preprocessing = preprocessing

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> NaflexTower:
        config = Siglip2VisionConfig(**cls.own_numbers(numbers))
        picture = PatchedPicture(numbers["patch_size"], numbers.get("max_num_patches", BUDGET))
        return with_picture_rule(cls(config, picture), numbers)

    @classmethod
    def resized(cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int) -> Any:
        raise RequestError(
            f"image_size {image_size}: this tower (NaFlex) takes pictures in their own shape, at most "
            f"{numbers['max_num_patches']} patches of {numbers['patch_size']} pixels: "
            "model.image_size=null, and model.max_patches=N for another budget"
        )

    def set_budget(self, max_patches: int) -> None:
        self.preprocessing = replace(self.preprocessing, budget=max_patches)

    def example(self, count: int) -> torch.Tensor:
        """Pictures that fill the budget."""
        blank, rows = super().example(count), math.isqrt(self.preprocessing.budget)
        sides = np.zeros(
            (rows * self.preprocessing.patch, self.preprocessing.budget // rows * self.preprocessing.patch, 3), np.uint8
        )
        return blank.copy_(self.preprocessing.pack(sides).expand_as(blank))

    def describe(self) -> dict[str, Any]:
        return super().describe() | picture_numbers(self.preprocessing)

    def embed(self, patches: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[n, patches, width]``, and bool ``[n, patches]``, true for those of the picture."""
        own = self.vision_model.embeddings
        place = torch.arange(patches.shape[1], device=grid.device)
        positions = resampled_positions(own.position_embedding.weight, grid, place)
        return own.patch_embedding(patches) + positions, place < grid.prod(1, keepdim=True)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        model: Any = self.vision_model
        tokens, real, _ = self._unpacked(pixels)
        if self.training and self.patch_dropout:
            tokens, real = _drop(tokens, real, self.patch_dropout)
        for layer in model.encoder.layers:
            tokens = layer(tokens, real[:, None, None])
        return model.head(model.post_layernorm(tokens), real)

    def _unpacked(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `embed`, and rows and columns of each picture."""
        patches, grid = PatchedPicture.unpack(pixels)
        if pixels.device.type == "cpu" and not torch.compiler.is_compiling():
            # Elsewhere than on the CPU, counting the patches would wait for the device.
            patches = patches[:, : int(grid.prod(1).max())]
        return *self.embed(patches, grid), grid

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        model: Any = self.vision_model
        tokens, real, grid = self._unpacked(pixels)
        for layer in model.encoder.layers[:-1]:
            tokens = layer(tokens, real[:, None, None])
        found = changed(of_transformers(model.encoder.layers[-1]), tokens, method, grid, real=real)
        return Patches(self._pool_each(model.post_layernorm(found)), grid)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        model: Any = self.vision_model
        tokens, real, grid = self._unpacked(pixels)
        for layer in model.encoder.layers:
            tokens = layer(tokens, real[:, None, None])
        tokens = model.post_layernorm(tokens)
        return Tokens(tokens, model.head(tokens, real), grid)

    def graph(self) -> nn.Module:
        return PlainNaflex(self)


def picture_numbers(picture: PatchedPicture) -> dict[str, Any]:
    """The picture rule for a description: the budget, and what is not the usual."""
    return {"max_num_patches": picture.budget} | unusual_rule(picture)


def resampled_positions(weight: torch.Tensor, grid: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """``[n, patches, width]``: the position embedding of each patch of each picture.

    Args:
        weight: ``[side², width]``, of a square of patches.
        grid: int64 ``[n, 2]``, rows and columns of each picture.
        place: int64 ``[patches]``, numbers of patches; what is beyond a picture's last one gets some embedding.
    """
    side = round(weight.shape[0] ** 0.5)
    rows, columns = grid[:, :1], grid[:, 1:]
    across = _weights(place % columns, columns, side)
    down = _weights(torch.minimum(place // columns, rows - 1), rows, side)
    return (down[..., None] * across[..., None, :]).flatten(2).to(weight.dtype) @ weight


def _weights(place: torch.Tensor, count: torch.Tensor, side: int) -> torch.Tensor:
    """``[n, patches, side]``: how much each of `side` embeddings counts at `place` ``[n, patches]`` of `count` ``[n, 1]``.

    A triangle around the place, as wide as the embeddings that fall on one patch where they are more, and one embedding else.
    """
    step = side / count
    centre = (place + 0.5) * step
    embedding = torch.arange(side, device=place.device) + 0.5
    distance = (embedding - centre[..., None]).abs() / step.clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)


def _drop(tokens: torch.Tensor, real: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A share of each picture's own patches left out, drawn per picture."""
    # Drawn on the CPU generator, so that a replayed step draws the same on every device.
    draw = to_device(torch.rand(real.shape), real.device).masked_fill(~real, 2.0)
    most = max(1, round(real.shape[1] * (1 - share)))
    kept = (real.sum(1) * (1 - share)).round().clamp(min=1)
    order = draw.argsort(1)[:, :most]
    chosen = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
    return chosen, torch.arange(most, device=real.device) < kept[:, None]


class PlainNaflex(nn.Module):
    """`NaflexTower.forward` as a graph: attention as two products and a softmax, the mask one addition."""

    def __init__(self, tower: NaflexTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        model: Any = self.tower.vision_model
        tokens, real = self.tower.embed(*PatchedPicture.unpack(pixels))
        mask = hiding(real, tokens)[:, None, None]
        return model.head(model.post_layernorm(plain_layers(model.encoder.layers, tokens, mask=mask)), real)
