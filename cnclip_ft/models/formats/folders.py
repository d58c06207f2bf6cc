"""Which reader a folder of transformers has, by the ``model_type`` of its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.formats.files import read_json, read_names
from cnclip_ft.models.formats.open_clip import is_open_clip
from cnclip_ft.models.formats.openai import is_openai
from cnclip_ft.models.known import IMPORT_PATH, READERS, refuse_code
from data_tools.errors import RequestError

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
    refuse_code(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise RequestError(
            f"{folder}: a model of type {repr(kind)[:60]}; whole models that are read here: {', '.join(sorted(READERS))}. "
            f"One of its towers may be a start: model.start={{image: …, text: …}}; {IMPORT_PATH}"
        )
    module, _, name = READERS[kind].partition(":")
    reader: Reader = getattr(import_module(module), name)
    return reader(folder, config, dtype)
