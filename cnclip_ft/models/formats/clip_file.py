"""A whole CLIP in OpenAI's and open_clip's names: OpenAI's ``.pt``, other files of weights, and open_clip's folder.

A folder says what it is in ``open_clip_config.json``; a bare file is recognised from its tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.assembly import Checkpoint, count_layers
from cnclip_ft.models.description import checked_half
from cnclip_ft.models.families.clip.bpe import OPEN_CLIP_NAMES, OPENAI_NAMES, VOCABULARY, clip_bpe
from cnclip_ft.models.families.clip.text import LARGEST, ClipText
from cnclip_ft.models.formats.clip_names import text_to_ours
from cnclip_ft.models.formats.files import Content, Tensors, read_weights
from cnclip_ft.models.formats.image_half import image_half
from cnclip_ft.models.formats.open_clip import CONFIGURATION, weights_of
from cnclip_ft.models.formats.open_clip_text import open_clip_text
from data_tools.errors import RequestError

_NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def read_open_clip(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """An open_clip hub folder.

    Raises:
        RequestError: not readable, or it asks for what is not done here.
    """
    file = weights_of(folder)
    return read_clip_file(file, read_weights(file, dtype))


def read_clip_file(file: Path, content: Content) -> Checkpoint:
    """A file of both towers; what lies beside it is looked at for configuration and vocabulary.

    Raises:
        RequestError: it is incomplete, or it asks for what is not done here.
    """
    half = image_half(file, content, None)
    rest = {name: tensor for name, tensor in content.tensors.items() if not name.startswith("visual.")}
    bias = rest.pop("logit_bias", None)
    configuration = file.parent / CONFIGURATION
    if configuration.is_file():
        numbers, tensors, tokenizer = open_clip_text(configuration, rest, half.projection)
    else:
        tensors = text_to_ours(rest)
        numbers = _recognised(file, tensors, half.numbers.get("hidden_act", "quick_gelu"))
        names = OPENAI_NAMES if "input_resolution" in rest else OPEN_CLIP_NAMES
        tokenizer = clip_bpe(file.parent, numbers["max_position_embeddings"], names=names)
    scale = rest.get("logit_scale")
    if scale is None:
        raise RequestError(f"{file}: the checkpoint is incomplete, no 'logit_scale' in it")
    scalars = {"logit_scale": scale.reshape(())}
    if bias is not None:
        scalars["logit_bias"] = bias.reshape(())
    description = {
        "architecture": None,
        "image": half.numbers,
        "text": numbers,
        "projection": half.projection,
        "context_length": tokenizer.context_length,
        "tokenizer": tokenizer.describe(),
    } | ({"logit_bias": True} if bias is not None else {})
    left_over = sorted(name for name in rest if name.endswith(_NOT_WEIGHTS)) + content.left_over
    return Checkpoint(
        str(file), description, half.tensors | tensors | scalars, None, left_over, half.notes, tokenizer=tokenizer
    )


def _recognised(file: Path, tensors: Tensors, activation: str) -> dict[str, Any]:
    """The text half of a description from the tensors; heads are 64 wide in all that were published."""
    try:
        rows, width = tensors["text_model.embeddings.token_embedding.weight"].shape
        positions = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
        inner = tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise RequestError(
            f"{file}: an English CLIP whose text tower is incomplete, no {error} in it. Its image tower may be a start: "
            f"model.start={{image: {file}, text: a BERT folder}}"
        ) from None
    if width % 64:
        raise RequestError(f"{file}: the number of heads of a text tower {width} wide is not in the file")
    found = {
        "kind": "clip_text", "vocab_size": rows, "hidden_size": width, "num_attention_heads": width // 64,
        "num_hidden_layers": count_layers(tensors, r"text_model\.encoder\.layers\.(\d+)\."), "intermediate_size": inner,
        "hidden_act": activation, "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "max_position_embeddings": positions,
        "eos_token_id": VOCABULARY - 1 if rows >= VOCABULARY else LARGEST,
    }  # fmt: skip
    return checked_half(ClipText, found, str(file))
