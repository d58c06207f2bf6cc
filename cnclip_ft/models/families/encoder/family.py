"""Encoders of transformers as a family.

One of pictures and one of texts, each with its own pooling, are its VisionTextDualEncoder.
"""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig, VisionTextDualEncoderConfig

from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.encoder.text import EncoderTower
from cnclip_ft.models.families.encoder.vision import VisionEncoderTower
from cnclip_ft.models.families.parts import class_config, processor_config
from cnclip_ft.models.family import Family


class Encoders(Family):
    name, own_pictures = "VisionTextDualEncoder", ("vit", VisionEncoderTower.kind)
    image_towers = (VisionEncoderTower,)
    text_towers = (EncoderTower,)
    exports = ("huggingface", "open_clip", "onnx")
    transformers_class = "VisionTextDualEncoderModel is an image encoder of transformers, or a ViT, with a text encoder's own pooled output (pooling: pooler)"

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        files, tower = super().transformers_files(model), model.text_tower
        assert isinstance(tower, EncoderTower)
        dim = model.image_tower.output_dim
        vision = _vision(model.image_tower, dim)
        if vision is not None and tower.pooling == "pooler":
            config = VisionTextDualEncoderConfig(
                vision_config=vision.to_dict(),
                text_config=tower.text_model.config.to_dict(),
                projection_dim=dim,
                logit_scale_init_value=model.logit_scale.item(),
            )
            files["config.json"] = class_config(model, config, "VisionTextDualEncoderModel")
        processor = processor_config(model, "CLIPImageProcessor", "VisionTextDualEncoderProcessor")
        return files | {"preprocessor_config.json": processor}


def _vision(tower: ImageTower, dim: int) -> PretrainedConfig | None:
    """The configuration of an image tower that transformers' class has a place for."""
    if isinstance(tower, VisionEncoderTower):
        return tower.vision_model.config
    if isinstance(tower, ViTTower):
        return CLIPVisionConfig(**ViTTower.own_numbers(tower.describe()), projection_dim=dim)
    return None


FAMILY = Encoders()
