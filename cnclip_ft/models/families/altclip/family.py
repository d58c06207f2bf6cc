"""AltCLIP as a family."""

from __future__ import annotations

from transformers import AltCLIPConfig

from cnclip_ft.models.families.altclip.text import AltTextTower
from cnclip_ft.models.families.clip.family import ClipLike


class AltClip(ClipLike):
    name = "AltCLIP"
    text_towers = (AltTextTower,)
    exports = ("huggingface", "onnx")
    transformers_class = "AltCLIPModel is a ViT with AltCLIP's text tower"
    config, architecture, processor = AltCLIPConfig, "AltCLIPModel", "AltCLIPProcessor"


FAMILY = AltClip()
