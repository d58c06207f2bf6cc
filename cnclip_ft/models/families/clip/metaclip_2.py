"""MetaCLIP 2 (arXiv 2507.22062) as a family: CLIP's towers with XLM-V's vocabulary."""

from __future__ import annotations

from transformers import MetaClip2Config

from cnclip_ft.models.families.clip.family import ClipLike
from cnclip_ft.models.families.clip.text import MetaClip2TextTower


class MetaClip2(ClipLike):
    name = "MetaCLIP 2"
    text_towers = (MetaClip2TextTower,)
    exports = ("huggingface", "open_clip", "onnx")
    config, architecture = MetaClip2Config, "MetaClip2Model"
    transformers_class = "MetaClip2Model is a ViT with MetaCLIP 2's text tower"


FAMILY = MetaClip2()
