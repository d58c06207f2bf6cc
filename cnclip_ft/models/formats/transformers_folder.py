"""transformers' Chinese CLIP folders (versions 4 and 5), read without transformers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ChineseCLIPTextConfig, ChineseCLIPVisionConfig

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.families.chinese_clip.roberta import RobertaTower
from cnclip_ft.models.families.chinese_clip.vit import ViTTower
from cnclip_ft.models.families.chinese_clip.wordpiece import CONTEXT_LENGTH
from cnclip_ft.models.families.numbers import unusual_rule
from cnclip_ft.models.formats.cn_clip import is_dropped, modern
from cnclip_ft.models.formats.files import Content, Tensors, read_weights
from cnclip_ft.models.formats.folder_rules import half_of, obeyed, text_rules
from cnclip_ft.models.formats.picture_rules import picture_rules, refuse_others, unsaid_rules
from cnclip_ft.models.formats.recognise import own_vocabulary, with_architecture
from cnclip_ft.models.preprocessing import Fit, SquarePicture
from data_tools.errors import RequestError


def read_chinese_clip(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``ChineseCLIPModel`` folder; `config` is its ``config.json``.

    Raises:
        RequestError: not readable, or it asks for what is not done here.
    """
    sections, content = sections_of(folder, config), read_weights(folder, dtype)
    tensors, left_over = model_tensors(folder, content)
    image = obeyed_vision(folder, sections["vision_config"], fit="squash")
    text = text_numbers(folder, sections["text_config"])
    vocabulary, context_length = text_rules(folder)
    if context_length is None:
        context_length = CONTEXT_LENGTH
    description = with_architecture(
        {
            "architecture": None,
            "image": image,
            "text": text,
            "projection": tensors["text_projection.weight"].shape[0],
            "context_length": min(context_length, text["max_position_embeddings"]),
        }
    )
    if vocabulary is None:
        vocabulary = own_vocabulary(folder, text, str(folder))
    left_over += content.left_over
    return Checkpoint(
        str(folder), description, tensors, vocabulary, left_over, content.notes, image_notes=unsaid_rules(folder)
    )


def sections_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The halves of a configuration by their keys; what is said beside them is obeyed or refused."""
    sections = {key: config.get(key) or {} for key in ("vision_config", "text_config")}
    for key, section in sections.items():
        again = config.get(f"{key}_dict")  # older folders say it twice; transformers takes this one
        if isinstance(section, dict) and isinstance(again, dict):
            sections[key] = section | again
    obeyed(config, (*sections, *(f"{key}_dict" for key in sections)), str(folder / "config.json"))
    return sections


def model_tensors(folder: Path, content: Content, last: str = "text_projection.weight") -> tuple[Tensors, list[str]]:
    """The tensors of a whole model under their present names, `last` among them, and the names of those no model uses."""
    tensors = modern(content.tensors)
    left_over = sorted(name for name in tensors if is_dropped(name))
    for name in left_over:
        del tensors[name]
    if last not in tensors:
        raise RequestError(f"{folder}: the checkpoint is incomplete, no {last!r} in it")
    return tensors, left_over


def obeyed_vision(folder: Path, config: Any, *, fit: Fit) -> dict[str, Any]:
    """`vision_numbers` of a whole model, whose pictures must be prepared as the folder says."""
    image, said = vision_numbers(folder, config, fit=fit)
    refuse_others(said)
    return image


def text_numbers(folder: Path, config: Any) -> dict[str, Any]:
    """Text half of a description from a configuration; what it leaves out has transformers' default.

    Raises:
        RequestError: a key or a value the text tower cannot have.
    """
    where = f"{folder / 'config.json'}: text_config"
    return half_of(RobertaTower, config, ChineseCLIPTextConfig(), where)


def vision_numbers(folder: Path, config: Any, *, fit: Fit) -> tuple[dict[str, Any], list[str]]:
    """Image half of a description from a vision configuration and the folder's processor; and what else the processor asks
    for, in words.

    Args:
        fit: what the family's processor does where the folder does not say.

    Raises:
        RequestError: a key or a value the image tower cannot have.
    """
    where = f"{folder / 'config.json'}: vision_config"
    numbers = half_of(ViTTower, config, ChineseCLIPVisionConfig(), where)
    picture, said = picture_rules(folder, SquarePicture(numbers["image_size"], fit))
    return numbers | unusual_rule(picture), said
