"""A file of weights of a whole model: an official Chinese CLIP, transformers', OpenAI's or open_clip's, or one of our exports."""

from __future__ import annotations

from pathlib import Path

import torch

from cnclip_ft.models.assembly import Checkpoint, described_in_file
from cnclip_ft.models.formats.clip_file import read_clip_file
from cnclip_ft.models.formats.cn_clip import is_dropped, is_official, modern, to_ours
from cnclip_ft.models.formats.files import read_weights
from cnclip_ft.models.formats.image_half import is_openai
from cnclip_ft.models.formats.recognise import recognise
from data_tools.errors import RequestError


def read_file(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Its tensors as `dtype`, renamed.

    Raises:
        RequestError: it cannot be read, or is no Chinese CLIP.
    """
    content = read_weights(path, dtype)
    tensors = content.tensors
    if is_official(tensors):
        left_over = sorted(content.file_names[name] for name in tensors if is_dropped(name))
        try:
            tensors = to_ours(tensors)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None
    elif "text_projection.weight" in tensors and any(name.startswith("text_model.") for name in tensors):
        left_over = sorted(name for name in tensors if is_dropped(name))
        tensors = modern({name: tensor for name, tensor in tensors.items() if not is_dropped(name)})
    elif is_openai(tensors):
        return read_clip_file(path, content)
    else:
        raise RequestError(
            f"{path}: not a Chinese CLIP (it has no text_projection, or no bert. or text_model. tensors)"
        )
    described = content.extras.get("cnclip_ft")  # beside the state dict of the files we export
    description = recognise(tensors, str(path)) if described is None else described_in_file(described, str(path))
    return Checkpoint(str(path), description, tensors, None, left_over + content.left_over, content.notes)
