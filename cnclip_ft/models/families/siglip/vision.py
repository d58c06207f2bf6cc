"""SigLIP's image tower for squares: transformers' SiglipVisionModel, whose attention pooling is the last map there is."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.families.chinese_clip.catalog import VisionTransformer
from cnclip_ft.models.families.fresh import from_recipe, keep_scale_, sine_positions_
from cnclip_ft.models.families.numbers import (
    check_activation,
    check_heads,
    unusual_rule,
    with_picture_rule,
)
from cnclip_ft.models.families.parts import drop_patches, set_checkpointing
from cnclip_ft.models.families.plain_attention import plain_layers
from cnclip_ft.models.families.siglip.layers import PoolingHead
from cnclip_ft.models.preprocessing import HALF, SquarePicture
from cnclip_ft.models.schema import Layers, PictureRule, Pixels, Share, Small, Width
from data_tools.errors import RequestError

LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "hidden_act",
    "layer_norm_eps", "attention_dropout",
)  # fmt: skip
VISION_KEYS = (*LAYER_KEYS, "image_size")
POSITIONS = "vision_model.embeddings.position_embedding.weight"


class VisionNumbers(PictureRule):
    """What both image towers of SigLIP have in common."""

    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    patch_size: Pixels
    hidden_act: str
    layer_norm_eps: Small
    attention_dropout: Share

    @model_validator(mode="after")
    def _agree(self) -> VisionNumbers:
        check_heads(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        return self


class SiglipVision(VisionNumbers):
    kind: Literal["siglip"]
    image_size: Pixels

    @model_validator(mode="after")
    def _patches(self) -> SiglipVision:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        return self


class PooledTower(ImageTower):
    """What both image towers of SigLIP have in common: layers over patches, then a pooling that ends in the common space."""

    layer_names = ("num_hidden_layers", r"vision_model\.encoder\.layers\.(\d+)\.")
    file_prefixes = ("vision_model.",)
    vision_model: Any

    def _take(self, model: nn.Module) -> None:
        self.vision_model = model
        self.vision_model.head.__class__ = PoolingHead  # weights and their names stay
        self.output_dim, self.patch_dropout = self.vision_model.config.hidden_size, 0.0

    @property
    def projection(self) -> None:
        return None

    def blocks(self) -> list[nn.Module]:
        model = self.vision_model
        return [model.embeddings, *model.encoder.layers, nn.ModuleList([model.post_layernorm, model.head])]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return super().decays(name, parameter) and not name.endswith("head.probe")

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        set_checkpointing(self.vision_model, wanted)


class SiglipTower(PooledTower):
    """transformers' SigLIP vision model; a picture's side need be no multiple of the patch's, what is left over is not seen."""

    kind, schema = "siglip", SiglipVision
    preprocessing: SquarePicture

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self._take(SiglipVisionModel(config))
        assert isinstance(config.image_size, int)  # a description holds no other
        self.preprocessing = SquarePicture(config.image_size, mean=HALF, std=HALF)

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> SiglipTower:
        config = SiglipVisionConfig(**{key: value for key, value in numbers.items() if key in VISION_KEYS})
        return with_picture_rule(cls(config), numbers)

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
            raise RequestError(f"image_size {image_size} is smaller than a patch; use {patch} or more")
        before, after = old // patch, image_size // patch
        grid = tensors[POSITIONS].float().T.reshape(1, -1, before, before)
        grid = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
        tensors[POSITIONS] = grid.flatten(2)[0].T.to(tensors[POSITIONS].dtype).contiguous()
        note = f"image size {old} → {image_size}: position embeddings resized {before}×{before} → {after}×{after} (bicubic)"
        return numbers | {"image_size": image_size}, [note]

    def describe(self) -> dict[str, Any]:
        numbers = {key: getattr(self.vision_model.config, key) for key in VISION_KEYS}
        return {"kind": self.kind} | numbers | unusual_rule(self.preprocessing)

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        model = self.vision_model
        tokens = model.embeddings(pixels)
        if self.training and self.patch_dropout:
            tokens = drop_patches(tokens, self.patch_dropout)
        for layer in model.encoder.layers:
            tokens = layer(tokens, None)
        return model.head(model.post_layernorm(tokens))

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
