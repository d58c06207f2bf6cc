"""The names of the official checkpoint (cn_clip ``.pt``), both ways; OpenAI's and open_clip's image towers share them.

``{"epoch", "step", "name", "state_dict", "optimizer"}``; released files are often fp16;
checkpoints trained with flash attention use fused names. The projections are stored transposed.
"""

from __future__ import annotations

import re

import torch

from cnclip_ft.models.formats.files import Tensors
from data_tools.errors import RequestError

_PLAIN = {  # official → transformers
    "logit_scale": "logit_scale",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    **{f"visual.ln_{a}.{part}": f"vision_model.{b}.{part}" for a, b in (("pre", "pre_layrnorm"), ("post", "post_layernorm"))
       for part in ("weight", "bias")},
}  # fmt: skip
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
LAYER_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def is_official(tensors: Tensors) -> bool:
    """Whether a state dict is a Chinese CLIP of the official code (an OpenAI CLIP has no ``bert.``)."""
    return "text_projection" in tensors and any(name.startswith("bert.embeddings.") for name in tensors)


def is_dropped(name: str) -> bool:
    """A tensor old checkpoints carry and no model uses: the text pooler, position numbers."""
    return ".pooler." in name or name.endswith("position_ids")


def modern(tensors: Tensors) -> Tensors:
    """Norms by their present names: TensorFlow conversions, and what transformers 5.0 saves, say gamma and beta."""
    ending = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {
        next((name.removesuffix(old) + new for old, new in ending.items() if name.endswith(old)), name): tensor
        for name, tensor in tensors.items()
    }


def to_ours(tensors: Tensors) -> Tensors:
    """Official names, also the fused ones of flash attention → file names of our checkpoints.

    What `is_dropped` is left out.

    Raises:
        RequestError: a tensor of no known name.
    """
    out: Tensors = {}
    plain = {_unfuse(name): tensor for name, tensor in tensors.items()}
    is_vit = any(name.startswith("visual.transformer.") for name in plain)
    unknown = []
    for name, tensor in plain.items():
        if is_dropped(name):
            continue
        if name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif name in _PLAIN and (is_vit or not name.startswith("visual.")):
            out[_PLAIN[name]] = tensor
        elif name.startswith("bert.") and ".Wqkv." in name:
            before, part = name.removeprefix("bert.").split("Wqkv.")
            for which, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"text_model.{before}{which}.{part}"] = chunk.clone()
        elif name.startswith("bert."):
            out[f"text_model.{name.removeprefix('bert.').replace('self.out_proj.', 'output.dense.')}"] = tensor
        elif is_vit and (match := _FUSED_LAYER.match(name)):
            for which, chunk in zip("qkv", tensor.chunk(3), strict=True):
                out[f"vision_model.encoder.layers.{match[1]}.self_attn.{which}_proj.{match[2]}"] = chunk.clone()
        elif is_vit and (match := _LAYER.match(name)) and match[2] in LAYER_PARTS:
            out[f"vision_model.encoder.layers.{match[1]}.{LAYER_PARTS[match[2]]}.{match[3]}"] = tensor
        elif not is_vit and name.startswith("visual."):
            out[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise RequestError(f"{len(unknown)} tensors are not those of a Chinese CLIP, e.g. {', '.join(unknown[:3])}")
    return out


def _unfuse(name: str) -> str:
    """Flash-attention names of the image tower → the plain ones."""
    return (
        name.replace("attn.Wqkv.weight", "attn.in_proj_weight").replace("attn.Wqkv.bias", "attn.in_proj_bias")
        if (name.startswith("visual."))
        else name
    )


def to_official(tensors: Tensors) -> Tensors:
    """File names of our checkpoints → official names without prefix; the exact inverse of `to_ours`."""
    out: Tensors = {}
    plain = {ours: theirs for theirs, ours in _PLAIN.items()}
    transposed = {ours: theirs for theirs, ours in _TRANSPOSED.items()}
    parts = {ours: theirs for theirs, ours in LAYER_PARTS.items()}
    for name, tensor in tensors.items():
        if name in transposed:
            out[transposed[name]] = tensor.T.contiguous()
        elif name in plain:
            out[plain[name]] = tensor
        elif name.startswith("text_model."):
            out[f"bert.{name.removeprefix('text_model.')}"] = tensor
        elif name.startswith("visual."):
            out[name] = tensor
        elif match := re.match(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$", name):
            chunks = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            out[f"visual.transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(chunks)
        elif re.search(r"self_attn\.[kv]_proj\.", name):
            continue  # with its q
        else:
            match = re.match(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name)
            assert match is not None  # all other names are done
            out[f"visual.transformer.resblocks.{match[1]}.{parts[match[2]]}.{match[3]}"] = tensor
    return out
