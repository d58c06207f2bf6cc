"""transformers' folders of SigLIP and SigLIP 2, fixed squares and NaFlex, read without transformers' own loader of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, Siglip2VisionConfig, SiglipTextConfig, SiglipVisionConfig

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer, Rules
from cnclip_ft.models.families.numbers import unusual_rule
from cnclip_ft.models.families.siglip.naflex import NaflexTower, picture_numbers
from cnclip_ft.models.families.siglip.sentencepiece import END, UNKNOWN, sentencepiece_backend
from cnclip_ft.models.families.siglip.text import SiglipTextTower
from cnclip_ft.models.families.siglip.vision import SiglipTower
from cnclip_ft.models.families.transformers_tower import TransformersTower
from cnclip_ft.models.formats.files import read_json, read_weights
from cnclip_ft.models.formats.folder_rules import IDS, compare_ids, half_of
from cnclip_ft.models.formats.picture_rules import (
    patch_rules,
    picture_rules,
    refuse_others,
    require_rules,
    unsaid_rules,
)
from cnclip_ft.models.formats.transformers_folder import model_tensors, sections_of
from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.preprocessing import HALF, SquarePicture
from data_tools.errors import RequestError
from data_tools.words import Said

_LAST = "text_model.head.weight"  # into the common space


def read_siglip(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``SiglipModel`` folder: SigLIP, and SigLIP 2 of a fixed size."""
    sections = sections_of(folder, config)
    image = _numbers(folder, sections, "vision_config", SiglipTower, SiglipVisionConfig())
    picture, said = picture_rules(folder, SquarePicture(image["image_size"], mean=HALF, std=HALF))
    return _read(folder, sections, image | unusual_rule(picture), said, unsaid_rules(folder), dtype)


def read_siglip2(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``Siglip2Model`` folder: SigLIP 2 with pictures in their own shape (NaFlex)."""
    sections = sections_of(folder, config)
    image = _numbers(folder, sections, "vision_config", NaflexTower, Siglip2VisionConfig())
    require_rules(folder, "a model that takes pictures in their own shape (at most how many patches)")
    picture, said = patch_rules(folder, PatchedPicture(image["patch_size"]))
    return _read(folder, sections, image | picture_numbers(picture), said, [], dtype)


def _read(
    folder: Path,
    sections: dict[str, Any],
    image: dict[str, Any],
    said: list[str],
    image_notes: list[str],
    dtype: torch.dtype,
) -> Checkpoint:
    """
    Args:
        said: of pictures, what is asked for and not done here.

    Raises:
        RequestError: not readable, or it asks for what is not done here.
    """
    refuse_others(said)
    own, usual_ids = sections["text_config"], SiglipTextConfig().to_dict()
    # What stands there by default is of no SigLIP's tokenizer.
    said_ids = {key: own[key] for key in own if key in IDS and own[key] != usual_ids[key]}
    usual = SiglipTextConfig(bos_token_id=None, eos_token_id=None)
    text = _numbers(folder, sections, "text_config", SiglipTextTower, usual)
    content = read_weights(folder, dtype)
    tensors, left_over = model_tensors(folder, content, last=_LAST)
    tokenizer, notes = _tokenizer(folder, text["max_position_embeddings"], naflex=image["kind"] == "siglip2")
    compare_ids(f"{folder / 'config.json'}: text_config", said_ids, tokenizer)
    description = {
        "architecture": None,
        "image": image,
        "text": text,
        "projection": tensors[_LAST].shape[0],
        "context_length": tokenizer.context_length,
        "logit_bias": True,
        "tokenizer": tokenizer.describe(),
    }
    padded = Said(
        "SigLIP attends to padding and reads the last position: texts are always filled up to {length} tokens, without a mask",
        "SigLIP 会注意到填充并读取最后一个位置：文本总是补齐到 {length} token，不用掩码",
        length=tokenizer.context_length,
    )
    left_over += content.left_over
    return Checkpoint(
        str(folder),
        description,
        tensors,
        None,
        left_over,
        content.notes,
        image_notes=image_notes,
        text_notes=[padded, *notes],
        tokenizer=tokenizer,
    )


def _numbers(
    folder: Path, sections: dict[str, Any], key: str, tower: type[TransformersTower], usual: PretrainedConfig
) -> dict[str, Any]:
    """One half of a description; what the configuration leaves out has transformers' default."""
    where = f"{folder / 'config.json'}: {key}"
    numbers = half_of(tower, sections[key], usual, where, ("pad_token_id", "projection_size", "vision_use_head"))
    if sections[key].get("vision_use_head") is False:
        raise RequestError(
            f"{where}.vision_use_head is false: without its pooling the model has no features of pictures"
        )
    return numbers


def _tokenizer(folder: Path, length: int, naflex: bool) -> tuple[FastTokenizer, list[str]]:
    """The folder's tokenizer, filled up to `length` on the right, and what is to be said of it."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    kind = str(settings.get("tokenizer_class", "SiglipTokenizer")).removesuffix("Fast")
    # Of those classes left is the default, and no mask is wanted.
    told: dict[str, Any] = {"padding_side": "right", "model_input_names": ["input_ids"]}
    notes: list[str] = []
    if kind == "SiglipTokenizer" and (folder / "spiece.model").is_file():
        tokenizer = _sentencepiece(folder / "spiece.model", settings, length)
    else:
        # SigLIP 2 learnt from lower case alone. transformers knows that of NaFlex folders, and of its later class.
        forgotten = kind == "GemmaTokenizer" and not naflex
        tokenizer = FastTokenizer.of_folder(folder, length, padding="max_length", mask="all", lower_case=forgotten)
        if kind == "GemmaTokenizer":
            told["tokenizer_class"] = "Siglip2Tokenizer"
        if forgotten:
            notes.append(
                Said(
                    "texts are made lower case, as for SigLIP 2 when it was trained; the folder's own tokenizer does not",
                    "文本转为小写，与 SigLIP 2 训练时一致；文件夹自带的分词器不这样做",
                )
            )
    tokenizer.settings |= told
    return tokenizer, notes


def _sentencepiece(file: Path, settings: dict[str, Any], length: int) -> FastTokenizer:
    lower = bool(settings.get("do_lower_case", True))
    backend = sentencepiece_backend(file, lower_case=lower)
    pad = settings.get("pad_token", END)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    number = backend.token_to_id(pad) if isinstance(pad, str) else None
    if number is None:
        raise RequestError(f"{file.parent}: pad_token {repr(pad)[:60]} is not in {file.name}; fetch the folder whole")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": UNKNOWN, "pad_token": pad}
    rules = Rules(
        kind="transformers",
        padding="max_length",
        mask="all",
        pad_id=number,
        end_id=backend.token_to_id(END),
        clean="siglip" if lower else "siglip_cased",
    )
    return FastTokenizer(backend, said, rules, length)
