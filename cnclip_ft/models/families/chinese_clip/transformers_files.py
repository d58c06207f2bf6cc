"""The configuration beside the weights from which transformers builds ChineseCLIPModel."""

from __future__ import annotations

from typing import Any

from transformers import ChineseCLIPConfig, ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.parts import class_config


def model_config(model: DualEncoder) -> dict[str, Any] | None:
    """`config.json`; None for towers that are not a ViT and a [CLS]-pooled RoBERTa."""
    image, text, dim = model.image_tower.describe(), model.text_tower.describe(), model.image_tower.output_dim
    if image["kind"] != "vit" or text["pooling"] != "cls":
        return None
    vision = ViTTower.own_numbers(image) | {"projection_dim": dim}
    text = {k: v for k, v in text.items() if k != "pooling"}
    config = ChineseCLIPConfig(
        text_config=ChineseCLIPTextConfig(**text).to_dict(),
        vision_config=ChineseCLIPVisionConfig(**vision).to_dict(),
        projection_dim=dim,
        logit_scale_init_value=model.logit_scale.item(),
    )
    return class_config(model, config, "ChineseCLIPModel")
