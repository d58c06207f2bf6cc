"""The names of CLIP's text tower in OpenAI's and open_clip's files, both ways; their image tower has the official Chinese names.

The projection is stored transposed, and query, key and value as one.
"""

from __future__ import annotations

import re

import torch

from cnclip_ft.models.formats.cn_clip import LAYER_PARTS
from cnclip_ft.models.formats.files import Tensors

_PLAIN = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_model.head.weight",  # SigLIP's, which has a bias
    "text_projection.bias": "text_model.head.bias",
}
_PROJECTION = ("text_projection", "text_projection.weight")
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$")
_OUR_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def text_to_ours(tensors: Tensors) -> Tensors:
    """The text tower's tensors of such a file under our file names; what is none of them is left out."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name == _PROJECTION[0]:
            out[_PROJECTION[1]] = tensor.T.contiguous()
        elif name in _PLAIN:
            out[_PLAIN[name]] = tensor
        elif match := _LAYER.match(name):
            layer = f"text_model.encoder.layers.{match[1]}"
            if match[2] == "attn.in_proj":
                for which, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{which}_proj.{match[3]}"] = chunk.clone()
            elif match[2] in LAYER_PARTS:
                out[f"{layer}.{LAYER_PARTS[match[2]]}.{match[3]}"] = tensor
    return out


def text_from_ours(tensors: Tensors) -> Tensors:
    """The exact inverse of `text_to_ours`, of a text tower's tensors alone."""
    plain, parts = ({ours: theirs for theirs, ours in names.items()} for names in (_PLAIN, LAYER_PARTS))
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name == _PROJECTION[1]:
            out[_PROJECTION[0]] = tensor.T.contiguous()
        elif name in plain:
            out[plain[name]] = tensor
        elif match := _OUR_LAYER.match(name):
            layer, part = f"transformer.resblocks.{match[1]}", match[2]
            if part == "self_attn.q_proj":
                chunks = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                out[f"{layer}.attn.in_proj_{match[3]}"] = torch.cat(chunks)
            elif part in parts:
                out[f"{layer}.{parts[part]}.{match[3]}"] = tensor
    return out
