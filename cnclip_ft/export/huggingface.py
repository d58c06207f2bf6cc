"""A folder that the class of transformers it belongs to, and its processor, read without a hub."""

from __future__ import annotations

from pathlib import Path

import torch

from cnclip_ft.export.others import quiet
from cnclip_ft.export.settings import ExportSettings
from cnclip_ft.models.assembly import describe_model, read_tokenizer
from cnclip_ft.models.checkpoints import CHECKPOINT, load, read_info, save_checkpoint
from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.formats.files import read_json
from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.registry import family_of
from data_tools.errors import RequestError

KIND = CHECKPOINT
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WORDS = {"resnet": "a ResNet", "foreign": "a module by import path", "vit": "a ViT"}


def check(model: DualEncoder) -> None:
    """Refuse towers that no class of transformers has a place for."""
    if _class_name(model) is None:
        family, description = family_of(model.text_tower), describe_model(model)
        kind, pooling = description["image"]["kind"], description["text"].get("pooling")
        text = (
            f"a {pooling}-pooled {description['text'].get('model_type', 'RoBERTa')}"
            if pooling
            else f"a {model.text_tower.kind}"
        )
        others = (
            [name for name in family.exports if name not in ("huggingface", "onnx")] if pooling in (None, "cls") else []
        )
        raise RequestError(
            f"transformers' {family.transformers_class}; the towers of this checkpoint are {_WORDS.get(kind, kind)} and "
            f"{text}. It can be used with cnclip_ft.load as it is"
            + (f", or exported with --to {' or '.join(others)}" if kind == "resnet" and others else "")
        )


def _class_name(model: DualEncoder) -> str | None:
    """The class of transformers whose parameters these are."""
    files = family_of(model.text_tower).transformers_files(model)
    return next(iter(files["config.json"].get("architectures", [])), None)


def write(model: DualEncoder, target: Path, order: ExportSettings) -> None:
    """Weights, configuration, processor and tokenizer; our own description beside them."""
    save_checkpoint(model, target, info=order.info)


def open_encoder(target: Path) -> DualEncoder:
    """The folder as our own reader sees it."""
    return load(target)


def read_features(target: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features by transformers' own model, in fp32."""
    from transformers import AutoModel
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():  # it reports our heads, of which it knows nothing; its numbers are compared here
            model = AutoModel.from_pretrained(target, dtype=torch.float32).eval()
    finally:
        if shown:
            logging.enable_progress_bar()
    tokenizer = read_tokenizer(read_info(target)["model"], target)
    ids, mask = tokenizer.pad(tokenizer.encode(texts))
    inputs = written_picture(target, pixels).for_transformers(pixels)
    image = model.get_image_features(**inputs).pooler_output
    text = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1)


def written_picture(target: Path, pixels: torch.Tensor) -> Preprocessing:
    """What the written processor says of pixels."""
    said = read_json(target / "preprocessor_config.json")
    mean, std = tuple(said["image_mean"]), tuple(said["image_std"])
    if "max_num_patches" in said:
        return PatchedPicture(said["patch_size"], said["max_num_patches"], mean, std)
    return SquarePicture(pixels.shape[2], mean=mean, std=std)


def advice(model: DualEncoder, output: Path) -> str:
    """How to read what was written."""
    files = family_of(model.text_tower).transformers_files(model)
    processor = files["preprocessor_config.json"]["processor_class"]
    return f'read it with transformers.{_class_name(model)}.from_pretrained("{output}") and {processor}.from_pretrained("{output}")'
