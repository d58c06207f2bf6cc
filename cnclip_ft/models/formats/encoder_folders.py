"""transformers' folders of text encoders, alone or in a VisionTextDualEncoder, read without its loader of weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from cnclip_ft.models.assembly import Checkpoint
from cnclip_ft.models.families.encoder import vision
from cnclip_ft.models.families.encoder.text import EncoderTower, configuration, is_causal
from cnclip_ft.models.families.encoder.transformers_model import of_section
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from cnclip_ft.models.formats.bert import TextHalf
from cnclip_ft.models.formats.cn_clip import is_dropped, modern
from cnclip_ft.models.formats.files import Tensors, read_folder, read_json
from cnclip_ft.models.formats.picture_rules import picture_rules, refuse_others, require_rules, square_side
from cnclip_ft.models.formats.pooling import choose_pooling
from cnclip_ft.models.formats.transformers_folder import obeyed_vision
from cnclip_ft.models.known import refuse_code
from cnclip_ft.models.preprocessing import HALF, SquarePicture
from data_tools.errors import RequestError
from data_tools.words import Said

CONTEXT_LENGTH = 77  # tokens: captions are short, however much the encoder could read


def read_encoder_half(folder: Path, pooling: str | None) -> TextHalf:
    """A text encoder or decoder of transformers, with its own tokenizer.

    Args:
        pooling: what the user asks for.

    Raises:
        RequestError: no text encoder, code of the folder, a pooling it does not have, or not readable.
    """
    if not (folder / "config.json").is_file():
        raise RequestError(
            f"{folder}: no config.json in it; expected a folder of a text encoder as transformers writes it"
        )
    config = read_json(folder / "config.json")
    refuse_code(folder)
    known = _known(folder, config)
    pooling, notes = choose_pooling(folder, pooling, "last" if is_causal(known) else "cls")
    tower, tokenizer = _tower_and_tokenizer(folder, known, pooling)
    after = sorted(place.name for place in folder.glob("[2-9]_Dense"))
    if after:
        notes.append(
            Said(
                "{after} of its author is not used; the projection is newly made",
                "作者的 {after} 未使用；投影层是新建的",
                after=", ".join(after),
            )
        )
    tensors, left_over = _own_tensors(folder, tower, read_folder(folder).tensors)
    return TextHalf(tower.describe(), tensors, None, str(folder), left_over, notes, tokenizer)


def read_dual_encoder(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A ``VisionTextDualEncoderModel`` folder: a CLIP's or any image encoder, and a text encoder.

    Raises:
        RequestError: an encoder that is not known, or not readable.
    """
    where = folder / "config.json"
    pictures, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(pictures, dict) or not isinstance(text, dict):
        raise RequestError(f"{where}: vision_config and text_config are not both there; fetch it again")
    require_rules(folder, "a VisionTextDualEncoderModel")
    encoder = None
    if pictures.get("model_type") in ("clip", "clip_vision_model"):
        own = pictures.get("vision_config") if pictures["model_type"] == "clip" else pictures
        image = obeyed_vision(folder, own, fit="crop")
    else:
        encoder = _image_encoder(folder, pictures)
        image = encoder.describe()
    tower, tokenizer = _tower_and_tokenizer(folder, _known(folder, text), "pooler")
    in_file = read_folder(folder, dtype).tensors
    tensors = modern(in_file)
    left_over = sorted(name for name in tensors if name.endswith("position_ids"))
    tensors = {
        name.replace("vision_model.vision_model.", "vision_model."): tensor  # as version 4 wrote it
        for name, tensor in tensors.items()
        if name not in left_over
    }
    expected = {"logit_scale", *tower.state_dict(), *(encoder.state_dict() if encoder else ())}
    if encoder and tensors.keys() != expected:  # a ViT's layers have other names in files
        tensors = _by_the_library(folder, in_file, expected, dtype) or tensors
    if "text_projection.weight" not in tensors:
        raise RequestError(f"{folder}: the checkpoint is incomplete, no 'text_projection.weight' in it")
    description = {
        "architecture": None,
        "image": image,
        "text": tower.describe(),
        "context_length": tokenizer.context_length,
        "projection": tensors["text_projection.weight"].shape[0],
        "tokenizer": tokenizer.describe(),
    }
    return Checkpoint(str(folder), description, tensors, None, tokenizer=tokenizer, left_over=left_over)


def _image_encoder(folder: Path, section: dict[str, Any]) -> vision.VisionEncoderTower:
    """The tower without memory; the size of pictures is the processor's, as some models take any (DINOv2)."""
    config = _known(folder, section, vision.configuration)
    side = square_side(folder) or getattr(config, "image_size", None)
    if type(side) is not int:
        raise RequestError(f"{folder}: its preprocessor_config.json does not say the size of pictures; fetch it again")
    picture, said = picture_rules(folder, SquarePicture(side, "squash", HALF, HALF, resample="bilinear"))
    refuse_others(said)
    with torch.device("meta"):
        tower = vision.VisionEncoderTower(config, 1, side)
    tower.preprocessing = picture
    tower.check()
    return tower


def _known(
    folder: Path, config: dict[str, Any], of: Callable[[str, dict[str, Any]], PretrainedConfig] = configuration
) -> Any:
    """transformers' own configuration of a section."""
    where = folder / "config.json"
    try:
        return of(str(config.get("model_type")), of_section(config))
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None


def _tower_and_tokenizer(folder: Path, config: Any, pooling: str) -> tuple[EncoderTower, FastTokenizer]:
    """The tower without memory, and its tokenizer."""
    with torch.device("meta"):
        tower = EncoderTower(config, 1, pooling)
    tokenizer = FastTokenizer.of_folder(folder, min(CONTEXT_LENGTH, tower.max_length))
    if pooling == "eos":
        tower.end_id = tokenizer.ends_in
        if tower.end_id is None:
            raise RequestError(
                f"pooling eos: the tokenizer of {folder} ends no text in a token of its own: model.start.pooling=last"
            )
    return tower, tokenizer


def _own_tensors(folder: Path, tower: EncoderTower, in_file: Tensors) -> tuple[Tensors, list[str]]:
    """The encoder's tensors under our names, and the names of heads and poolers beside it."""
    tensors = modern(in_file)
    own, prefix = tower.text_model.state_dict().keys(), f"{tower.text_model.base_model_prefix}."
    if any(name.removeprefix(prefix) in own for name in tensors if name.startswith(prefix)):
        names = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    else:
        names = {name: name for name in tensors}
    left_over = sorted(name for name in tensors if names.get(name) not in own)
    strange = [name for name in left_over if name in names and not is_dropped(f".{names[name]}")]
    if strange:
        found = _by_the_library(folder, in_file, own)
        if found is None:
            raise RequestError(
                f"{folder}: {len(strange)} tensors belong to no {type(tower.text_model).__name__}, e.g. {', '.join(strange[:3])}"
            )
        return {f"text_model.{name}": tensor for name, tensor in found.items()}, []
    return {f"text_model.{mine}": tensors[name] for name, mine in names.items() if mine in own}, left_over


def _by_the_library(
    folder: Path, in_file: Tensors, own: Collection[str], dtype: torch.dtype = torch.float32
) -> Tensors | None:
    """The tensors as transformers renames and joins them while it loads (ViT, nomic_bert, mixtures of experts); None where they do
    not fit there either.

    Args:
        in_file: what was read, by the file's names. transformers takes these: it would map the file and stay mapped to it, and
            a second reading costs as much as the first.
        own: the names that must be there.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            laid_out = AutoModel.from_config(config, trust_remote_code=False)
        model, told = type(laid_out).from_pretrained(
            None, config=laid_out.config, state_dict=dict(in_file), dtype=dtype, output_loading_info=True
        )
    except Exception:  # noqa: BLE001 - whatever it is, the names in the file are told
        return None
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = [name for name in told["missing_keys"] if name in own]
    if missing or told["unexpected_keys"] or told["mismatched_keys"]:
        return None
    return {name: tensor for name, tensor in model.state_dict().items() if name in own}
