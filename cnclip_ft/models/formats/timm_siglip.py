"""SigLIP's image tower under timm's names, as open_clip has it → transformers' names, so that it needs no timm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.models.assembly import count_layers
from cnclip_ft.models.description import checked_half
from cnclip_ft.models.families.siglip.vision import SiglipVision
from cnclip_ft.models.formats.files import Tensors
from cnclip_ft.models.formats.open_clip import refusal
from data_tools.errors import RequestError

_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # by width, of all that timm has (vit_*_siglip_*)
_NAMES = {
    "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm", "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm", "attn_pool.mlp.fc1": "head.mlp.fc1", "attn_pool.mlp.fc2": "head.mlp.fc2",
}  # fmt: skip
_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)$")
_POOL = "attn_pool.latent"


def is_timm_siglip(tensors: Tensors) -> bool:
    """Whether an open_clip file's image tower is timm's ViT with SigLIP's pooling and nothing behind it."""
    return f"visual.trunk.{_POOL}" in tensors and not any(name.startswith("visual.head.") for name in tensors)


def read_timm_siglip(file: Path, tensors: Tensors, vision: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Image half of a description and its tensors under our file names.

    Args:
        file: to be named in messages.
        tensors: of the whole model.
        vision: ``vision_cfg``.

    Raises:
        RequestError: it is no such tower, or not of a size that is known.
    """
    for key, value in vision.items():
        expected = {"timm_pool": "map", "timm_proj": "none"}.get(key)
        if expected is not None and value != expected:
            raise refusal(file, f"vision_cfg.{key}", value, expected)
    trunk = {name.removeprefix("visual.trunk."): t for name, t in tensors.items() if name.startswith("visual.trunk.")}
    out: Tensors = {}
    try:
        out["vision_model.embeddings.position_embedding.weight"] = trunk.pop("pos_embed")[0].contiguous()
        out["vision_model.head.probe"] = trunk.pop(_POOL)
        for part in ("weight", "bias"):
            both = torch.cat([trunk.pop(f"attn_pool.q.{part}"), trunk.pop(f"attn_pool.kv.{part}")])
            out[f"vision_model.head.attention.in_proj_{part}"] = both
        patch, inner = trunk["patch_embed.proj.weight"], trunk["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise RequestError(f"{file}: the image tower is incomplete, no {error} in it") from None
    for name, tensor in trunk.items():
        owner, _, kind = name.rpartition(".")
        if match := _BLOCK.match(name):
            layer = f"vision_model.encoder.layers.{match[1]}"
            if match[2] == "attn.qkv":
                for which, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{which}_proj.{kind}"] = chunk.clone()
            else:
                out[f"{layer}.{_PARTS.get(match[2], match[2])}.{kind}"] = tensor
        else:
            out[f"vision_model.{_NAMES.get(owner, owner)}.{kind}"] = tensor
    width, side = patch.shape[0], patch.shape[-1]
    if width not in _HEADS:
        raise RequestError(f"{file}: the number of heads of an image tower {width} wide is not known")
    count = len(out["vision_model.embeddings.position_embedding.weight"])
    numbers = {
        "kind": "siglip", "hidden_size": width, "intermediate_size": inner, "num_attention_heads": _HEADS[width],
        "num_hidden_layers": count_layers(out, r"vision_model\.encoder\.layers\.(\d+)\."), "patch_size": side,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "attention_dropout": 0.0,
        "image_size": vision.get("image_size", round(count**0.5) * side),
    }  # fmt: skip
    return checked_half(SiglipVision, numbers, str(file)), out


def to_timm(tensors: Tensors) -> Tensors:
    """The exact inverse, of the image tower's tensors alone."""
    names, parts = ({ours: theirs for theirs, ours in known.items()} for known in (_NAMES, _PARTS))
    out: Tensors = {}
    for name, tensor in tensors.items():
        owner, _, kind = name.removeprefix("vision_model.").rpartition(".")
        match = re.match(r"encoder\.layers\.(\d+)\.(.+)$", owner)
        if owner == "embeddings.position_embedding":
            out["pos_embed"] = tensor[None]
        elif name == "vision_model.head.probe":
            out[_POOL] = tensor
        elif kind.startswith("in_proj_"):
            part, width = kind.removeprefix("in_proj_"), len(tensor) // 3
            out[f"attn_pool.q.{part}"], out[f"attn_pool.kv.{part}"] = tensor[:width].clone(), tensor[width:].clone()
        elif match and match[2] == "self_attn.q_proj":
            chunks = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            out[f"blocks.{match[1]}.attn.qkv.{kind}"] = torch.cat(chunks)
        elif match and match[2] in parts:
            out[f"blocks.{match[1]}.{parts[match[2]]}.{kind}"] = tensor
        elif owner in names:
            out[f"{names[owner]}.{kind}"] = tensor
    return {f"visual.trunk.{name}": tensor for name, tensor in out.items()}
