"""Chinese CLIP as a family: its kinds of towers and its tokenizer."""

from __future__ import annotations

from typing import Any

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.resnet import ResNetTower
from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
from cnclip_ft.models.families.chinese_clip.transformers_files import model_config
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.families.parts import processor_config
from cnclip_ft.models.family import Family, WebClasses


class ChineseClip(Family):
    name, own_pictures = "Chinese CLIP", ("vit", "resnet")
    image_towers = (ViTTower, ResNetTower)
    text_towers = (RobertaTower,)
    tokenizers = (TextTokenizer,)
    templates = "zh"
    transformers_class = "ChineseCLIPModel is a ViT with a [CLS]-pooled RoBERTa"
    exports = ("huggingface", "cn_clip", "onnx")
    web = WebClasses("chinese_clip", processor_of_2022=True)

    def transformers_files(self, model: DualEncoder) -> dict[str, dict[str, Any]]:
        config = model_config(model)
        files = super().transformers_files(model) if config is None else {"config.json": config}
        return files | {
            "preprocessor_config.json": processor_config(model, "ChineseCLIPImageProcessor", "ChineseCLIPProcessor")
        }


FAMILY = ChineseClip()
