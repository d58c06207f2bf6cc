"""Text encoders of transformers as a family; with a ViT and the library's own pooling they are its VisionTextDualEncoder."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, VisionTextDualEncoderConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.encoder.text import EncoderTower
from cnclip_ft.models.families.parts import class_config, processor_config
from cnclip_ft.models.family import Family


class Encoders(Family):
    text_towers = (EncoderTower,)
    exports = ("huggingface", "open_clip", "onnx")
    transformers_class = "VisionTextDualEncoderModel is a ViT with an encoder's own pooled output (pooling: pooler)"

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        files, tower, image = super().transformers_files(model), model.text_tower, model.image_tower.describe()
        assert isinstance(tower, EncoderTower)
        if image["kind"] == "vit" and tower.pooling == "pooler":
            dim = model.image_tower.output_dim
            vision = CLIPVisionConfig(**ViTTower.own_numbers(image), projection_dim=dim)
            config = VisionTextDualEncoderConfig(
                vision_config=vision.to_dict(),
                text_config=tower.config.to_dict(),
                projection_dim=dim,
                logit_scale_init_value=model.logit_scale.item(),
            )
            files["config.json"] = class_config(model, config, "VisionTextDualEncoderModel")
        processor = processor_config(model, "CLIPImageProcessor", "VisionTextDualEncoderProcessor")
        return files | {"preprocessor_config.json": processor}


FAMILY = Encoders()
