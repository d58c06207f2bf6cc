"""An image encoder of transformers as an image tower (ViT, DINOv2, DINOv3, SigLIP's, …): its own pooled output and a projection."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dense import METHODS, LastBlock, Patches, Tokens, changed, of_transformers
from cnclip_ft.models.families.encoder import transformers_model
from cnclip_ft.models.families.numbers import unusual_rule, with_picture_rule
from cnclip_ft.models.families.parts import new_projection, set_checkpointing, square_grid
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.schema import PictureRule, Pixels
from data_tools.errors import RequestError

KNOWN = ("vit", "deit", "beit", "swin", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model")
_TYPES = MODEL_FOR_IMAGE_MAPPING_NAMES.keys() - {"timm_backbone", "timm_wrapper"}  # which may fetch what they name


PLAIN = ("vit", "deit", "dinov2", "dinov2_with_registers", "siglip_vision_model")
"""Types whose last block can be changed to give features of patches."""


def _parts(layer: Any) -> LastBlock:
    """Of a layer built as ViT's, DINOv2's or SigLIP's in transformers."""
    if hasattr(layer, "self_attn"):
        return of_transformers(layer)
    own = layer.attention
    first, second = ("norm1", "norm2") if hasattr(layer, "norm1") else ("layernorm_before", "layernorm_after")
    scale = [getattr(layer, name, nn.Identity()) for name in ("layer_scale1", "layer_scale2")]
    return LastBlock(
        getattr(layer, first),
        own.q_proj,
        own.k_proj,
        own.v_proj,
        lambda mixed: scale[0](own.o_proj(mixed)),
        lambda hidden: hidden + scale[1](layer.mlp(getattr(layer, second)(hidden))),
        own.num_attention_heads,
    )


def configuration(model_type: str, numbers: dict[str, Any]) -> PretrainedConfig:
    """transformers' configuration of these numbers.

    Raises:
        ValueError: the type is no image encoder of transformers, or the numbers are not of it.
    """
    config = transformers_model.configuration(
        model_type, numbers, _TYPES, f"read here: clip_vision_model, {', '.join(KNOWN)} and others like them", "model"
    )
    if type(getattr(config, "hidden_size", None)) is not int:
        raise ValueError(f"a model of type {model_type} has no one width; read here: {', '.join(KNOWN)}")
    return config


class VisionEncoder(PictureRule):
    kind: Literal["vision_encoder"]
    model_type: Annotated[str, Field(max_length=60)]
    config: dict[str, Any]
    image_size: Pixels

    @model_validator(mode="after")
    def _agree(self) -> VisionEncoder:
        configuration(self.model_type, self.config)
        return self


class VisionEncoderTower(ImageTower):
    """transformers' `AutoModel` of an image encoder; its pooled output goes through a bias-free map, as in the library's
    VisionTextDualEncoder.

    Args:
        image_size: side of the pictures; it need not be the configuration's where the model interpolates its positions.
    """

    kind, schema = "vision_encoder", VisionEncoder
    file_prefixes = ("vision_model.", "visual_projection.")
    can_be_new = False
    preprocessing: SquarePicture

    def __init__(self, config: PretrainedConfig, output_dim: int, image_size: int) -> None:
        super().__init__()
        self.vision_model = transformers_model.laid_out(config)
        for name, parameter in self.vision_model.named_parameters():
            if name.endswith("mask_token"):  # of its own training; nothing here has a gradient for it
                parameter.requires_grad_(False)
        self.visual_projection = new_projection(config.hidden_size, output_dim)
        self.preprocessing, self.output_dim = SquarePicture(image_size), output_dim

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> VisionEncoderTower:
        config = configuration(numbers["model_type"], numbers["config"])
        return with_picture_rule(cls(config, output_dim, numbers["image_size"]), numbers)

    def check(self) -> None:
        """One picture through the tower without memory, as which it is left.

        Raises:
            RequestError: the model does not take its pictures, or has no pooled output as wide as its configuration says.
        """
        side, width = self.image_size, self.vision_model.config.hidden_size
        with torch.no_grad():
            try:
                shape = self.eval().to("meta").trunk(torch.empty(1, 3, side, side, device="meta")).shape
            except Exception as error:  # noqa: BLE001 - every model stumbles in its own way
                raise RequestError(
                    f"vision_config: a {self.vision_model.config.model_type} of transformers does not take pictures of {side} × {side} "
                    f"({str(error)[:160]}); expected the size it was made for"
                ) from None
        if shape != (1, width):
            raise RequestError(
                f"vision_config: the pooled output of a {self.vision_model.config.model_type} is {list(shape[1:])}, expected [{width}]; read here: "
                + ", ".join(KNOWN)
            )

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model_type": self.vision_model.config.model_type,
            "config": transformers_model.described(self.vision_model.config),
            "image_size": self.image_size,
        } | unusual_rule(self.preprocessing)

    @property
    def projection(self) -> nn.Module:
        return self.visual_projection

    def replace_projection(self, output_dim: int) -> None:
        self.visual_projection, self.output_dim = (
            new_projection(self.vision_model.config.hidden_size, output_dim),
            output_dim,
        )

    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        if pooled is None:
            raise ValueError("it has no pooled output")
        return pooled

    @property
    def patch_methods(self) -> tuple[str, ...]:
        """Of plain ViTs: a block with rotated or shifted positions is none whose keys and queries say what is alike."""
        return () if self._last_layer() is None else METHODS

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        self.check_patches(method)
        model, layer = self.vision_model, self._last_layer()
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            model(pixel_values=pixels)
        finally:
            handle.remove()
        grid, seen = square_grid(self.image_size, model.config.patch_size, pixels)
        found = changed(_parts(layer), kept[0], method, grid[:1], prefix=kept[0].shape[1] - int(grid[0].prod()))
        found = (model.post_layernorm if hasattr(model, "post_layernorm") else model.layernorm)(found)
        # What pooling makes of one patch alone takes the place of the pooled output.
        pool = getattr(model, "head", None) or getattr(model, "pooler", None)
        each = found.flatten(0, 1) if pool is None else pool(found.flatten(0, 1)[:, None])
        return Patches(self.project(each).unflatten(0, found.shape[:2]), grid, seen)

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        self.check_patches()
        given = self.vision_model(pixel_values=pixels)
        grid, seen = square_grid(self.image_size, self.vision_model.config.patch_size, pixels)
        hidden = given.last_hidden_state
        return Tokens(hidden[:, hidden.shape[1] - int(grid[0].prod()) :], given.pooler_output, grid, seen)

    def _last_layer(self) -> Any:
        """None where the model is no ViT whose parts are known."""
        model: Any = self.vision_model
        if model.config.model_type not in PLAIN or type(getattr(model.config, "patch_size", None)) is not int:
            return None
        layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), None)
        layer: Any = None if layers is None else layers[-1]
        attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
        return layer if hasattr(attention, "q_proj") else None  # releases before name the parts otherwise

    def blocks(self) -> list[nn.Module]:
        """As of a text encoder: what stands before the layers, the layers, the projection last."""
        return [
            *transformers_model.stem_and_layers(self.vision_model, self.vision_model.config.num_hidden_layers),
            self.visual_projection,
        ]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and name.endswith("weight") and "position" not in name

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        if wanted and not self.vision_model.supports_gradient_checkpointing:
            return super().set_gradient_checkpointing(wanted)
        set_checkpointing(self.vision_model, wanted)
