"""transformers' folders of CLIP, MetaCLIP 2 and AltCLIP, read without transformers' own loader of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AltCLIPTextConfig, CLIPTextConfig, MetaClip2TextConfig, PretrainedConfig

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.families.altclip.text import AltTextTower
from cnclip_ft.models.families.clip.text import LARGEST, ClipTextTower, MetaClip2TextTower
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer, Mask
from cnclip_ft.models.families.transformers_tower import ProjectedText
from cnclip_ft.models.formats.files import read_json, read_weights
from cnclip_ft.models.formats.folder_rules import compare_ids, half_of
from cnclip_ft.models.formats.picture_rules import unsaid_rules
from cnclip_ft.models.formats.transformers_folder import model_tensors, obeyed_vision, sections_of
from data_tools.errors import RequestError

_SAVED = "vision_model.encoder.layer."
CONTEXT_LENGTH = 77  # of all three as their authors use them


def read_clip(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``CLIPModel`` folder."""
    return _read(folder, config, dtype, ClipTextTower, CLIPTextConfig(), "to_end")


def read_metaclip_2(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``MetaClip2Model`` folder."""
    return _read(folder, config, dtype, MetaClip2TextTower, MetaClip2TextConfig(), "tokens")


def read_altclip(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """An ``AltCLIPModel`` folder (AltCLIP, m9 and m18)."""
    return _read(folder, config, dtype, AltTextTower, AltCLIPTextConfig(), "tokens")


def _read(
    folder: Path,
    config: dict[str, Any],
    dtype: torch.dtype,
    kind: type[ProjectedText],
    usual: PretrainedConfig,
    mask: Mask,
) -> Checkpoint:
    """
    Args:
        usual: what holds of the text tower where the folder says nothing.

    Raises:
        RequestError: not readable, or it asks for what is not done here.
    """
    sections = sections_of(folder, config)
    where = f"{folder / 'config.json'}: text_config"
    text = half_of(kind, sections["text_config"], usual, where, beside=("pad_token_id",))
    image = obeyed_vision(folder, sections["vision_config"], fit="crop")
    content = read_weights(folder, dtype)
    tensors, left_over = model_tensors(folder, content)
    # What transformers 5 saves of AltCLIP names the layers of both halves as only the text half's were published.
    tensors = {name.replace(_SAVED, "vision_model.encoder.layers."): tensor for name, tensor in tensors.items()}
    length = min(CONTEXT_LENGTH, kind.schema.model_validate(text).longest, _said_length(folder))
    tokenizer = FastTokenizer.of_folder(folder, length, mask=mask)
    if kind is AltTextTower:  # its positions are counted from the pad's number
        compare_ids(where, usual.to_dict() | sections["text_config"], tokenizer)
    end, read = tokenizer.rules.end_id, text.get("eos_token_id")
    if read not in (None, end) and not (kind is ClipTextTower and read == LARGEST):
        raise RequestError(
            f"{where}.eos_token_id is {read}, and texts are read there, but those of the tokenizer beside it end in {end}: it is another "
            "model's; fetch both again"
        )
    description = {
        "architecture": None,
        "image": image,
        "text": text,
        "projection": tensors["text_projection.weight"].shape[0],
        "context_length": length,
        "tokenizer": tokenizer.describe(),
    }
    left_over += content.left_over
    return Checkpoint(
        str(folder),
        description,
        tensors,
        None,
        left_over,
        content.notes,
        image_notes=unsaid_rules(folder),
        tokenizer=tokenizer,
    )


def _said_length(folder: Path) -> int:
    """Longest text in tokens of which the folder speaks."""
    file = folder / "tokenizer_config.json"
    said = read_json(file).get("model_max_length") if file.is_file() else None
    return int(said) if isinstance(said, (int, float)) and 3 <= said < 1e6 else CONTEXT_LENGTH  # 1e30 is "no limit"
