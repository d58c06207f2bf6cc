"""transformers' Chinese CLIP folders (versions 4 and 5), read without transformers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.data.images import OPENAI_MEAN, OPENAI_STD
from cnclip_ft.data.texts import CONTEXT_LENGTH
from cnclip_ft.models.build import TEXT_KEYS, VISION_KEYS, Checkpoint, own_vocabulary, with_architecture
from cnclip_ft.models.files import read_folder, read_json
from cnclip_ft.models.official import is_dropped, modern
from data_tools.errors import RequestError


def read_chinese_clip(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """A ``ChineseCLIPModel`` folder.

    Raises:
        RequestError: another model, or not readable.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "chinese_clip":
        raise RequestError(
            f"{folder}: a model of type {config.get('model_type')!r}, not chinese_clip. One of its towers may be a start: "
            "model.start={image: …, text: …}"
        )
    tensors = modern(read_folder(folder, dtype).tensors)
    left_over = sorted(name for name in tensors if is_dropped(name))
    for name in left_over:
        del tensors[name]
    if "text_projection.weight" not in tensors:
        raise RequestError(f"{folder}: the checkpoint is incomplete, no 'text_projection.weight' in it")
    description = with_architecture({
        "architecture": None, "image": vision_numbers(folder, config.get("vision_config") or {}),
        "text": text_numbers(config.get("text_config") or {}),
        "projection": tensors["text_projection.weight"].shape[0], "context_length": CONTEXT_LENGTH,
    })  # fmt: skip
    description["context_length"] = min(CONTEXT_LENGTH, description["text"]["max_position_embeddings"])
    vocabulary = own_vocabulary(folder, description["text"], str(folder))
    return Checkpoint(str(folder), description, tensors, vocabulary, left_over)


def text_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """Text half of a description from a configuration; what it leaves out has transformers' default."""
    full = ChineseCLIPTextConfig(**{key: value for key, value in config.items() if key in TEXT_KEYS})
    return {"pooling": "cls"} | {key: getattr(full, key) for key in TEXT_KEYS}


def vision_numbers(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Image half of a description from a vision configuration and the folder's ``preprocessor_config.json``."""
    full = ChineseCLIPVisionConfig(**{key: value for key, value in config.items() if key in VISION_KEYS})
    numbers = {"kind": "vit"} | {key: getattr(full, key) for key in VISION_KEYS}
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found = read_json(processor)
        mean, std = found.get("image_mean") or OPENAI_MEAN, found.get("image_std") or OPENAI_STD
        if any(abs(a - b) > 1e-6 for a, b in zip([*mean, *std], [*OPENAI_MEAN, *OPENAI_STD], strict=False)):
            numbers |= {"mean": list(mean), "std": list(std)}
    return numbers
