"""CLIP as a family, and what families of the same build share: the configuration from which transformers makes the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPConfig, PretrainedConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.clip.text import ClipTextTower
from cnclip_ft.models.families.parts import class_config, processor_config
from cnclip_ft.models.family import Family, WebClasses


class ClipLike(Family):
    """A family whose model in transformers is a ViT, a text model and two projections, under the names of CLIPModel."""

    config: Callable[..., PretrainedConfig]
    architecture: str
    own_pictures = ("vit", "resnet")
    templates = "clip+en"
    processor = "CLIPProcessor"

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        files = super().transformers_files(model)
        image = model.image_tower.describe()
        if image["kind"] == "vit":
            dim = model.image_tower.output_dim
            text = {key: value for key, value in model.text_tower.describe().items() if key != "kind"}
            config = self.config(
                text_config={"bos_token_id": None, "pad_token_id": model.tokenizer.pad_id}
                | text
                | {"projection_dim": dim},
                vision_config=ViTTower.own_numbers(image) | {"projection_dim": dim},
                projection_dim=dim,
                logit_scale_init_value=model.logit_scale.item(),
            )
            files["config.json"] = class_config(model, config, self.architecture)
        return files | {"preprocessor_config.json": processor_config(model, "CLIPImageProcessor", self.processor)}


class Clip(ClipLike):
    name = "CLIP"
    text_towers = (ClipTextTower,)
    exports = ("huggingface", "open_clip", "onnx")
    config, architecture = CLIPConfig, "CLIPModel"
    web = WebClasses("clip")
    transformers_class = "CLIPModel is a ViT with CLIP's text tower"


FAMILY = Clip()
