"""BERT and RoBERTa-wwm towers as text starts: a Hugging Face folder, or a bare file of weights.

The pooler and the heads of pre-training are left over; the text projection is always newly made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.formats.cn_clip import is_official, modern, to_ours
from cnclip_ft.models.formats.files import Tensors, read_json, read_weights
from cnclip_ft.models.formats.pooling import SAID, choose_pooling
from cnclip_ft.models.formats.recognise import own_vocabulary, recognise_text
from cnclip_ft.models.formats.transformers_folder import text_numbers
from cnclip_ft.models.known import refuse_code
from data_tools.errors import RequestError

# Left over of a BERT: pooler, heads of pre-training, position numbers. Of a CLIP: its image half and projections.
_OTHER = re.compile(
    r"pooler\.|cls\.|classifier\.|lm_head\.|visual|vision_model\.|text_projection|logit_scale$|.*position_ids$"
)
_TYPES = ("bert", "chinese_clip", "chinese_clip_text_model")


@dataclass
class TextHalf:
    """What was read: `numbers` (text half of a description), `tensors` named ``text_model.…``, vocabulary, names left over."""

    numbers: dict[str, Any]
    tensors: Tensors
    vocabulary: Path | None
    source: str
    left_over: list[str]
    notes: list[str]
    tokenizer: Tokenizer | None = None  # of the whole model it is a half of, which may be of any kind


def has_text_half(path: Path) -> bool:
    """Whether the text tower there is read by `read_text_half`: other kinds, and a BERT of other texts than lower-cased WordPiece,
    are read as any encoder of transformers."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return True
    kind = read_json(path / "config.json").get("model_type")
    if kind != "bert":
        return kind is None or kind in _TYPES
    settings, whole = path / "tokenizer_config.json", path / "tokenizer.json"
    if settings.is_file() and read_json(settings).get("do_lower_case") is False:
        return False
    said = read_json(whole) if whole.is_file() else {}
    model, normaliser = said.get("model"), said.get("normalizer")
    if isinstance(normaliser, dict) and normaliser.get("lowercase") is False:
        return False
    return not isinstance(model, dict) or model.get("type", "WordPiece") == "WordPiece"


def read_text_half(path: Path, pooling: str | None = None) -> TextHalf:
    """The text tower of a BERT folder, a Chinese CLIP, or a bare ``pytorch_model.bin``.

    Args:
        pooling: what the user asks for.

    Raises:
        RequestError: no BERT-style text tower in it, or incomplete.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        refuse_code(path)
    config = _configuration(folder, path)
    content = read_weights(path)
    tensors = content.tensors
    if is_official(tensors):
        config, tensors = None, to_ours(tensors)
    tensors = {_name(name): tensor for name, tensor in modern(tensors).items()}
    if not any(name.startswith("text_model.embeddings.") for name in tensors):
        raise RequestError(
            f"{path}: no BERT-style text tower in it (no tensor named embeddings.word_embeddings.weight)"
        )
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_model.") and not _is_other(name)}
    left_over = sorted(tensors.keys() - text.keys())
    unexpected = [name for name in left_over if not _is_other(name)]
    try:
        found = recognise_text(text) if config is None else text_numbers(folder, config)
    except (KeyError, ValueError) as error:
        raise RequestError(f"{path}: the text tower is incomplete, no {error} in it") from None
    if unexpected:
        raise RequestError(f"{path}: {len(unexpected)} tensors belong to no BERT, e.g. {', '.join(unexpected[:3])}")
    notes = content.notes
    if pooling is not None or (folder / SAID).is_file():
        pooling, said = choose_pooling(folder, pooling, "cls")
        found, notes = found | {"pooling": pooling}, notes + said
    return TextHalf(
        found, text, own_vocabulary(folder, found, str(path)), str(path), left_over + content.left_over, notes
    )


def _configuration(folder: Path, path: Path) -> dict[str, Any] | None:
    """The text configuration beside the weights; None where sizes have to come from the tensors."""
    if not (folder / "config.json").is_file():
        if path.is_dir():
            raise RequestError(
                f"{folder}: no config.json in it; expected a BERT or RoBERTa folder (or name its pytorch_model.bin)"
            )
        return None
    config = read_json(folder / "config.json")
    kind = config.get("model_type", "bert")
    if kind not in _TYPES:
        raise RequestError(
            f"{folder}: a text model of type {repr(kind)[:60]}; the text tower is BERT (also RoBERTa-wwm and other RoBERTas of type bert)"
        )
    if kind == "chinese_clip":
        return config.get("text_config") or {}
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise RequestError(
            f"{folder}: position embeddings of type {repr(config['position_embedding_type'])[:60]}; the text tower has absolute ones"
        )
    return config


def _name(name: str) -> str:
    name = name.removeprefix("bert.")
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _is_other(name: str) -> bool:
    return _OTHER.match(name.removeprefix("text_model.")) is not None
