"""Which folders of others are read, the way out for the rest, and the one look at whether a folder names code of its own.

Such code (``auto_map``) is never run, whatever its folder is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnclip_ft.models.formats.files import read_json
from data_tools.errors import RequestError

# module:function of whole models by their model_type, called with the folder, its configuration and the weights' type.
READERS = {
    "chinese_clip": "cnclip_ft.models.formats.transformers_folder:read_chinese_clip",
    "clip": "cnclip_ft.models.formats.clip_folders:read_clip",
    "metaclip_2": "cnclip_ft.models.formats.clip_folders:read_metaclip_2",
    "altclip": "cnclip_ft.models.formats.clip_folders:read_altclip",
    "siglip": "cnclip_ft.models.formats.siglip_folders:read_siglip",
    "siglip2": "cnclip_ft.models.formats.siglip_folders:read_siglip2",
    "vision-text-dual-encoder": "cnclip_ft.models.formats.encoder_folders:read_dual_encoder",
}
# Folders of others without transformers' config.json: module:function that tells one, and that reads it, called with the folder
# and the weights' type.
FOLDERS = {
    "open_clip": (
        "cnclip_ft.models.formats.open_clip:is_open_clip",
        "cnclip_ft.models.formats.clip_file:read_open_clip",
    ),
}
IMAGE_HALVES = ("clip_vision_model", "chinese_clip_vision_model")
TEXT_ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "modernbert",
    "deberta-v2",
    "electra",
    "mpnet",
    "qwen3",
    "gemma3_text",
    "llama",
)
IMPORT_PATH = "an image tower of any kind comes by an import path (docs/towers.md#your-own-image-tower-by-import-path)"
_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_DEEPEST = 8  # sections in sections


def refuse_code(folder: Path) -> None:
    """
    Raises:
        RequestError: a file of the folder names code of its own, for the model, a half of it, its pictures or its texts.
    """
    for name in _FILES:
        file = folder / name
        found = _code_in(read_json(file)) if file.is_file() else None
        if found:
            raise RequestError(
                f"{file}: names code of its own ({repr(found)[:80]}), which is never run. If transformers' own classes do what that code "
                "does, take auto_map out of the file. Read without code are whole models of type "
                f"{', '.join(sorted(READERS))}, and encoders of texts as {', '.join(TEXT_ENCODERS)}; {IMPORT_PATH}"
            )


def _code_in(content: Any) -> Any:
    sections = [content]
    for _ in range(_DEEPEST):
        sections = [section for section in sections if isinstance(section, dict)]
        for section in sections:
            if section.get("auto_map"):
                return section["auto_map"]
        sections = [each for section in sections for each in section.values()]
    return None
