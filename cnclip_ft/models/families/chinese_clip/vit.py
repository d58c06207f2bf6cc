"""The ViT image tower: transformers' ChineseCLIP vision model with its projection, under its parameter names."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import METHODS, Patches, Tokens, changed, of_transformers
from cnclip_ft.models.families.chinese_clip.catalog import VisionTransformer
from cnclip_ft.models.families.chinese_clip.layers import skip_unread, whole_layer
from cnclip_ft.models.families.fresh import check_new_size, from_recipe, keep_scale_, sine_positions_
from cnclip_ft.models.families.numbers import SquareNumbers, resize_positions, unusual_rule, with_picture_rule
from cnclip_ft.models.families.parts import drop_patches, new_projection, square_grid
from cnclip_ft.models.families.plain_attention import plain_layers
from cnclip_ft.models.families.transformers_tower import TransformersTower
from cnclip_ft.models.preprocessing import SquarePicture

POSITIONS = "vision_model.embeddings.position_embedding.weight"


class Vit(SquareNumbers):
    kind: Literal["vit"]


class ViTTower(TransformersTower, ImageTower):
    """transformers' ChineseCLIP vision model with its projection.

    `patch_dropout` (arXiv 2212.00794): share of the patches left out of a training step, drawn per image; 0 in eval mode.
    """

    kind, schema = "vit", Vit
    preprocessing: SquarePicture
    config_keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
        "hidden_act", "layer_norm_eps", "attention_dropout",
    )  # fmt: skip
    layer_names = ("num_hidden_layers", r"vision_model\.encoder\.layers\.(\d+)\.")
    file_prefixes = ("vision_model.", "visual_projection.")

    def __init__(self, config: ChineseCLIPVisionConfig, output_dim: int) -> None:
        super().__init__()
        self.vision_model = ChineseCLIPVisionModel(config)
        skip_unread(self.vision_model.encoder.layers, first_token=True)
        self.visual_projection = new_projection(config.hidden_size, output_dim)
        assert isinstance(config.image_size, int)  # a description holds no other
        self.preprocessing = SquarePicture(config.image_size)
        self.output_dim, self.patch_dropout = output_dim, 0.0

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> ViTTower:
        config = ChineseCLIPVisionConfig(**cls.own_numbers(numbers), projection_dim=output_dim)
        return with_picture_rule(cls(config, output_dim), numbers)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int, image_size: int | None = None) -> ViTTower:
        return cls.make(from_recipe(VisionTransformer, numbers, "image"), output_dim, image_size)

    @classmethod
    def make(cls, numbers: VisionTransformer, output_dim: int, image_size: int | None = None) -> ViTTower:
        size = check_new_size(image_size or numbers.image_size, numbers.patch)
        config = ChineseCLIPVisionConfig(
            hidden_size=numbers.hidden,
            intermediate_size=numbers.intermediate or 4 * numbers.hidden,
            num_hidden_layers=numbers.layers,
            num_attention_heads=numbers.heads,
            image_size=size,
            patch_size=numbers.patch,
            projection_dim=output_dim,
            hidden_act="quick_gelu",
        )
        tower = cls(config, output_dim)
        keep_scale_(tower.vision_model.encoder)
        sine_positions_(tower.vision_model.embeddings.position_embedding)
        return tower

    @classmethod
    def resized(
        cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        return resize_positions(numbers, tensors, POSITIONS, numbers["patch_size"], image_size)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.vision_model
        if not (self.training and self.patch_dropout):
            return model(pixel_values=pixels).pooler_output
        tokens = model.embeddings(pixels)
        patches = drop_patches(tokens[:, 1:], self.patch_dropout)
        hidden = model.pre_layrnorm(torch.cat([tokens[:, :1], patches], dim=1))
        return model.post_layernorm(model.encoder(inputs_embeds=hidden).last_hidden_state[:, 0])

    @property
    def patch_methods(self) -> tuple[str, ...]:
        return METHODS

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        hidden, model = self._before_last(pixels), self.vision_model
        grid, seen = self._grid(pixels)
        found = changed(of_transformers(model.encoder.layers[-1]), hidden, method, grid[:1], prefix=1)
        return Patches(self.project(model.post_layernorm(found)), grid, seen)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        hidden, model = self._before_last(pixels), self.vision_model
        hidden = model.post_layernorm(whole_layer(model.encoder.layers[-1], hidden))
        return Tokens(hidden[:, 1:], hidden[:, 0], *self._grid(pixels))

    def _grid(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
        patch = self.vision_model.config.patch_size
        assert isinstance(patch, int)  # a description holds no other
        return square_grid(self.preprocessing.size, patch, pixels)

    def _before_last(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[n, 1 + patches, width]`` that the last layer is given."""
        model = self.vision_model
        hidden = model.pre_layrnorm(model.embeddings(pixels))
        for layer in model.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden

    @property
    def model(self) -> Any:
        return self.vision_model

    @property
    def projection(self) -> nn.Module:
        return self.visual_projection

    def replace_projection(self, output_dim: int) -> None:
        width = self.vision_model.config.hidden_size
        self.visual_projection, self.output_dim = new_projection(width, output_dim), output_dim

    def describe(self) -> dict[str, Any]:
        return super().describe() | unusual_rule(self.preprocessing)

    def graph(self) -> nn.Module:
        return PlainViT(self)

    def blocks(self) -> list[nn.Module]:
        model = self.vision_model
        stem = nn.ModuleList([model.embeddings, model.pre_layrnorm])
        layers = list(model.encoder.layers)
        return [stem, *layers[:-1], nn.ModuleList([layers[-1], model.post_layernorm]), self.visual_projection]


class PlainViT(nn.Module):
    """`ViTTower.forward` as a graph: attention as two products and a softmax."""

    def __init__(self, tower: ViTTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.tower
        model = tower.vision_model
        hidden = model.pre_layrnorm(model.embeddings(pixels))
        hidden = plain_layers(model.encoder.layers, hidden, read=lambda x: x[:, :1])
        return tower.project(model.post_layernorm(hidden[:, 0]))
