"""An open_clip hub folder: ``open_clip_config.json``, ``open_clip_model.safetensors``, the tokenizer's files beside them.

What open_clip reads with ``create_model_from_pretrained("local-dir:FOLDER")`` and ``get_tokenizer("local-dir:FOLDER")``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.export.settings import ExportSettings
from cnclip_ft.models.assembly import describe_model
from cnclip_ft.models.checkpoints import TOKENIZER_FILES, file_tensors, load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.formats.files import save_tensors
from cnclip_ft.models.formats.open_clip import CONFIGURATION, UNCLEANED, WEIGHTS, is_open_clip
from cnclip_ft.models.formats.open_clip_writing import model_config, open_clip_tensors, picture_config
from data_tools.errors import RequestError
from data_tools.outputs import FolderKind, folder_with

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


KIND = FolderKind(
    "open_clip folder of ours",
    lambda folder: is_open_clip(folder) and folder_with(CONFIGURATION, "cnclip_ft")(folder),
    re.compile(rf"{re.escape(WEIGHTS[0])}|{re.escape(CONFIGURATION)}|{TOKENIZER_FILES}"),
)


def check(model: DualEncoder) -> None:
    """Refuse what open_clip's configuration cannot express."""
    try:
        model_config(describe_model(model))
        picture_config(model.image_tower.preprocessing)
    except ValueError as error:
        raise RequestError(
            f"open_clip cannot express this checkpoint: {error}. It can be used with cnclip_ft.load as it is"
        ) from None


def write(model: DualEncoder, target: Path, order: ExportSettings) -> None:
    """Weights, configuration and tokenizer; how it came to be stands in the configuration, where open_clip passes it over."""
    target.mkdir()
    description = describe_model(model)
    towers = {name: tensor for name, tensor in file_tensors(model).items() if not name.startswith("heads.")}
    save_tensors(open_clip_tensors(towers, description), target / WEIGHTS[0])
    content: dict[str, Any] = {
        "model_cfg": model_config(description),
        "preprocess_cfg": picture_config(model.image_tower.preprocessing),
        "cnclip_ft": order.info | ({} if cleaned(model) else {UNCLEANED: True}),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (target / CONFIGURATION).write_text(text, encoding="utf-8")
    model.tokenizer.save(target)


def open_encoder(target: Path) -> DualEncoder:
    """The folder read back, in fp32. (That open_clip reads the same is what the tests prove.)"""
    return load(target)


def read_features(target: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of the folder read back, in fp32."""
    model = open_encoder(target)
    return model.image_features(pixels), model.encode_texts(texts)


def cleaned(model: DualEncoder) -> bool:
    """Whether its texts are prepared as open_clip prepares every text."""
    return bool(model.tokenizer.describe().get("clean"))


def advice(model: DualEncoder, output: Path) -> str:
    """How to read what was written."""
    other = "; open_clip mends broken encodings and HTML in texts before it tokenises them, this model does not"
    return (
        f'read it with open_clip.create_model_from_pretrained("local-dir:{output}") and '
        f'open_clip.get_tokenizer("local-dir:{output}"){"" if cleaned(model) else other}'
    )
