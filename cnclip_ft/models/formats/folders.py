"""Which reader a folder of transformers has, by the ``model_type`` of its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.build import Checkpoint
from cnclip_ft.models.formats.files import read_json, read_names
from cnclip_ft.models.formats.open_clip import is_open_clip
from cnclip_ft.models.formats.openai import is_openai
from data_tools.errors import RequestError

# module:function, called with the folder, its configuration and the weights' type.
READERS = {
    "chinese_clip": "cnclip_ft.models.formats.transformers_folder:read_chinese_clip",
    "clip": "cnclip_ft.models.formats.clip_folders:read_clip",
    "metaclip_2": "cnclip_ft.models.formats.clip_folders:read_metaclip_2",
    "altclip": "cnclip_ft.models.formats.clip_folders:read_altclip",
    "siglip": "cnclip_ft.models.formats.siglip_folders:read_siglip",
    "siglip2": "cnclip_ft.models.formats.siglip_folders:read_siglip2",
    "vision-text-dual-encoder": "cnclip_ft.models.formats.encoder_folders:read_dual_encoder",
}
Reader = Callable[[Path, dict[str, Any], torch.dtype], Checkpoint]


def is_whole(path: Path) -> bool:
    """Whether a folder of transformers or open_clip, or a file, holds a model of two towers that is no Chinese CLIP's file."""
    if path.is_file():
        return is_openai(read_names(path))
    file = path / "config.json"
    return str(read_json(file).get("model_type")) in READERS if file.is_file() else is_open_clip(path)


def read_folder_of_transformers(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """A whole model of any family that is known.

    Raises:
        RequestError: another kind of model, code of the folder, or not readable.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        code = (
            f" The folder names code of its own for it ({repr(config['auto_map'])[:80]}), which is never run."
            if config.get("auto_map")
            else ""
        )
        raise RequestError(
            f"{folder}: a model of type {repr(kind)[:60]}; whole models that are read here: {', '.join(sorted(READERS))}.{code} "
            "One of its towers may be a start: model.start={image: …, text: …}; an image tower of any kind by an import path "
            "(docs/towers.md#your-own-image-tower-by-import-path)"
        )
    module, _, name = READERS[kind].partition(":")
    reader: Reader = getattr(import_module(module), name)
    return reader(folder, config, dtype)
