"""SigLIP's image tower for squares: transformers' SiglipVisionModel, whose attention pooling is the last map there is."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import METHODS, Patches, Tokens, changed, of_transformers
from cnclip_ft.models.families.chinese_clip.catalog import VisionTransformer
from cnclip_ft.models.families.fresh import from_recipe, keep_scale_, sine_positions_
from cnclip_ft.models.families.numbers import (
    SquareNumbers,
    resized_grid,
    unusual_rule,
    with_picture_rule,
)
from cnclip_ft.models.families.parts import drop_patches, square_grid
from cnclip_ft.models.families.plain_attention import plain_layers
from cnclip_ft.models.families.siglip.layers import PoolingHead
from cnclip_ft.models.families.transformers_tower import TransformersTower
from cnclip_ft.models.preprocessing import HALF, SquarePicture
from data_tools.errors import RequestError

POSITIONS = "vision_model.embeddings.position_embedding.weight"


class SiglipVision(SquareNumbers):
    kind: Literal["siglip"]


class PooledTower(TransformersTower, ImageTower):
    """What both image towers of SigLIP have in common: layers over patches, then a pooling that ends in the common space."""

    config_keys: ClassVar[tuple[str, ...]] = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act",
        "layer_norm_eps", "attention_dropout",
    )  # fmt: skip
    layer_names = ("num_hidden_layers", r"vision_model\.encoder\.layers\.(\d+)\.")
    file_prefixes = ("vision_model.",)
    vision_model: Any

    def _take(self, model: nn.Module) -> None:
        self.vision_model = model
        self.vision_model.head.__class__ = PoolingHead  # weights and their names stay
        self.output_dim, self.patch_dropout = self.vision_model.config.hidden_size, 0.0

    @property
    def model(self) -> Any:
        return self.vision_model

    @property
    def projection(self) -> None:
        return None

    @property
    def patch_methods(self) -> tuple[str, ...]:
        return METHODS

    def _pool_each(self, patches: torch.Tensor) -> torch.Tensor:
        """``[n, patches, width]`` → the same: each as the pooling gives it that sees it alone, which takes the place of a projection.

        Of one token the pooling is its value path: attention over one is 1.
        """
        head = self.vision_model.head
        own = head.attention
        _, _, to_value = own.in_proj_weight.chunk(3)
        pooled = own.out_proj(F.linear(patches, to_value, own.in_proj_bias.chunk(3)[2]))
        return pooled + head.mlp(head.layernorm(pooled))

    def blocks(self) -> list[nn.Module]:
        model = self.vision_model
        return [model.embeddings, *model.encoder.layers, nn.ModuleList([model.post_layernorm, model.head])]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and not name.endswith("head.probe")


class SiglipTower(PooledTower):
    """transformers' SigLIP vision model; a picture's side need be no multiple of the patch's, what is left over is not seen."""

    kind, schema = "siglip", SiglipVision
    config_keys = (*PooledTower.config_keys, "image_size")
    preprocessing: SquarePicture

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self._take(SiglipVisionModel(config))
        assert isinstance(config.image_size, int)  # a description holds no other
        self.preprocessing = SquarePicture(config.image_size, mean=HALF, std=HALF)

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> SiglipTower:
        return with_picture_rule(cls(SiglipVisionConfig(**cls.own_numbers(numbers))), numbers)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int, image_size: int | None = None) -> SiglipTower:
        found = from_recipe(VisionTransformer, numbers, "image")
        size = image_size or found.image_size
        config = SiglipVisionConfig(
            hidden_size=found.hidden,
            intermediate_size=found.intermediate or 4 * found.hidden,
            num_hidden_layers=found.layers,
            num_attention_heads=found.heads,
            patch_size=found.patch,
            image_size=size,
        )
        if found.patch > size:
            raise RequestError(f"model.start.image: patch {found.patch} is larger than the picture, {size}")
        tower = cls(config)
        keep_scale_(tower.vision_model.encoder)
        sine_positions_(tower.vision_model.embeddings.position_embedding, others=0)
        return tower

    @classmethod
    def resized(
        cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        """As transformers' ``interpolate_pos_encoding`` does at run time: bicubic, corners not aligned."""
        old, patch = numbers["image_size"], numbers["patch_size"]
        if image_size == old:
            return numbers, []
        if image_size < patch:
            raise RequestError(f"image_size {image_size} is smaller than a patch: model.image_size={patch} or more")
        before, after = old // patch, image_size // patch
        grid, note = resized_grid(tensors[POSITIONS], before, after, aligned=False, old=old, new=image_size)
        tensors[POSITIONS] = grid.contiguous()
        return numbers | {"image_size": image_size}, [note]

    def describe(self) -> dict[str, Any]:
        return super().describe() | unusual_rule(self.preprocessing)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.vision_model
        tokens = model.embeddings(pixels)
        if self.training and self.patch_dropout:
            tokens = drop_patches(tokens, self.patch_dropout)
        for layer in model.encoder.layers:
            tokens = layer(tokens, None)
        return model.head(model.post_layernorm(tokens))

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        model = self.vision_model
        hidden = self._layers(pixels, slice(-1))
        grid, seen = square_grid(self.preprocessing.size, model.config.patch_size, pixels)
        found = changed(of_transformers(model.encoder.layers[-1]), hidden, method, grid[:1])
        return Patches(self._pool_each(model.post_layernorm(found)), grid, seen)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        model = self.vision_model
        hidden = model.post_layernorm(self._layers(pixels, slice(None)))
        return Tokens(
            hidden, model.head(hidden), *square_grid(self.preprocessing.size, model.config.patch_size, pixels)
        )

    def _layers(self, pixels: torch.Tensor, some: slice) -> torch.Tensor:
        hidden = self.vision_model.embeddings(pixels)
        for layer in self.vision_model.encoder.layers[some]:
            hidden = layer(hidden, None)
        return hidden

    def graph(self) -> nn.Module:
        return PlainSiglip(self)


class PlainSiglip(nn.Module):
    """`SiglipTower.forward` as a graph: attention as two products and a softmax."""

    def __init__(self, tower: SiglipTower) -> None:
        super().__init__()
        self.vision_model = tower.vision_model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.vision_model
        tokens = plain_layers(model.encoder.layers, model.embeddings(pixels))
        return model.head(model.post_layernorm(tokens))
