"""A folder that ``transformers.ChineseCLIPModel.from_pretrained`` and ``ChineseCLIPProcessor`` read without a hub."""

from __future__ import annotations

from pathlib import Path

import torch

from cnclip_ft.export.order import Order
from cnclip_ft.models.build import describe_model, read_tokenizer
from cnclip_ft.models.checkpoints import load, read_info, save_checkpoint
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import normalise
from data_tools.errors import RequestError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WORDS = {"resnet": "a ResNet", "foreign": "a module by import path", "vit": "a ViT"}


def check(model: DualEncoder) -> None:
    """Refuse towers transformers' ChineseCLIPModel has no place for."""
    description = describe_model(model)
    kind, pooling = description["image"]["kind"], description["text"]["pooling"]
    if kind != "vit" or pooling != "cls":
        raise RequestError(
            "transformers' ChineseCLIPModel is a ViT with a [CLS]-pooled RoBERTa; the towers of this checkpoint are "
            f"{_WORDS.get(kind, kind)} and a {pooling}-pooled RoBERTa. It can be used with cnclip_ft.load as it is"
            + (", or exported with --to cn_clip" if kind == "resnet" and pooling == "cls" else "")
        )


def write(model: DualEncoder, target: Path, order: Order) -> None:
    """Weights, configuration, processor and tokenizer; our own description beside them."""
    save_checkpoint(model, target, info=order.info)


def open_encoder(target: Path) -> DualEncoder:
    """The folder as our own reader sees it."""
    return load(target)


def read_features(target: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features by transformers' own model, in fp32."""
    from transformers import ChineseCLIPModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = ChineseCLIPModel.from_pretrained(target, dtype=torch.float32).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer = read_tokenizer(read_info(target)["model"], target)
    ids, mask = tokenizer.pad(tokenizer.encode(texts))
    mean, std = _mean_std(target)
    image = model.get_image_features(pixel_values=normalise(pixels, mean, std)).pooler_output
    text = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1)


def _mean_std(target: Path) -> tuple[list[float], list[float]]:
    from cnclip_ft.models.formats.files import read_json

    processor = read_json(target / "preprocessor_config.json")
    return processor["image_mean"], processor["image_std"]


def advice(model: DualEncoder, output: Path) -> str:
    """How to read what was written."""
    return f'read it with transformers.ChineseCLIPModel.from_pretrained("{output}") and ChineseCLIPProcessor.from_pretrained("{output}")'
