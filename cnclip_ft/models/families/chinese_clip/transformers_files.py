"""Files beside the weights from which transformers builds ChineseCLIPModel and its processor."""

from __future__ import annotations

from typing import Any

from transformers import ChineseCLIPConfig, ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.vit import VISION_KEYS
from cnclip_ft.models.preprocessing import PILLOW_FILTERS


def model_config(model: DualEncoder) -> dict[str, Any] | None:
    """`config.json`; None for towers that are not a ViT and a [CLS]-pooled RoBERTa."""
    image, text, dim = model.image_tower.describe(), model.text_tower.describe(), model.image_tower.output_dim
    if image["kind"] != "vit" or text["pooling"] != "cls":
        return None
    vision = {k: v for k, v in image.items() if k in VISION_KEYS} | {"projection_dim": dim}
    text = {k: v for k, v in text.items() if k != "pooling"}
    config = ChineseCLIPConfig(
        text_config=ChineseCLIPTextConfig(**text).to_dict(),
        vision_config=ChineseCLIPVisionConfig(**vision).to_dict(),
        projection_dim=dim,
        logit_scale_init_value=model.logit_scale.item(),
    )
    return config.to_dict() | {"architectures": ["ChineseCLIPModel"], "dtype": str(model.dtype).removeprefix("torch.")}


def processor_config(model: DualEncoder) -> dict[str, Any]:
    """`preprocessor_config.json`; what it leaves out, transformers' defaults would say otherwise."""
    picture = model.image_tower.preprocessing
    cropped = {"crop_size": {"height": picture.size, "width": picture.size}} if picture.fit == "crop" else {}
    return {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "processor_class": "ChineseCLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": picture.size} if cropped else {"height": picture.size, "width": picture.size},
        "resample": int(PILLOW_FILTERS[picture.resample]),
        "do_center_crop": bool(cropped),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(picture.mean),
        "image_std": list(picture.std),
    } | cropped
