"""Which reader a folder of others has: by the ``model_type`` of its ``config.json``, or by what tells its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.formats.files import read_ahead, read_json, read_names
from cnclip_ft.models.known import FOLDERS, IMPORT_PATH, READERS, refuse_code
from data_tools.errors import RequestError

Reader = Callable[[Path, dict[str, Any], torch.dtype], Checkpoint]


def is_whole(path: Path) -> bool:
    """Whether a folder of others, or a file, holds a model of two towers that is no Chinese CLIP's file."""
    if path.is_file():
        from cnclip_ft.models.formats.image_half import is_openai  # and with it the towers of transformers

        return is_openai(read_names(path))
    file = path / "config.json"
    return str(read_json(file).get("model_type")) in READERS if file.is_file() else _other(path) is not None


def _other(folder: Path) -> str | None:
    """What reads a folder that is not transformers'."""
    return next((reader for is_here, reader in FOLDERS.values() if resolve_name(is_here)(folder)), None)


def read_folder_of_others(folder: Path, dtype: torch.dtype) -> Checkpoint | None:
    """A whole model of any family that is known; None where nothing tells what kind of folder it is.

    Raises:
        RequestError: another kind of model, code of the folder, or not readable.
    """
    if (folder / "config.json").exists():
        return _read_transformers(folder, dtype)
    reader = _other(folder)
    return None if reader is None else resolve_name(reader)(folder, dtype)


def _read_transformers(folder: Path, dtype: torch.dtype) -> Checkpoint:
    config = read_json(folder / "config.json")
    refuse_code(folder)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise RequestError(
            f"{folder}: a model of type {repr(kind)[:60]}; whole models that are read here: {', '.join(sorted(READERS))}. "
            f"One of its towers may be a start: model.start={{image: …, text: …}}; {IMPORT_PATH}"
        )
    with read_ahead(folder, dtype):
        reader: Reader = resolve_name(READERS[kind])
        return reader(folder, config, dtype)
