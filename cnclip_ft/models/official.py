"""The official checkpoint (cn_clip ``.pt``): names, towers and sizes, both ways.

``{"epoch", "step", "name", "state_dict", "optimizer"}``; keys may carry ``module.``; released files are often fp16;
checkpoints trained with flash attention use fused names. The projections are stored transposed.
"""

from __future__ import annotations

import re

import torch

from cnclip_ft.models.catalog import ARCHITECTURES, Architecture, ResNet, TextTransformer, VisionTransformer
from data_tools.errors import RequestError

Tensors = dict[str, torch.Tensor]
_PLAIN = {  # official → transformers
    "logit_scale": "logit_scale",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    **{f"visual.ln_{a}.{part}": f"vision_model.{b}.{part}" for a, b in (("pre", "pre_layrnorm"), ("post", "post_layernorm"))
       for part in ("weight", "bias")},
}  # fmt: skip
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_LAYER_PARTS = {
    "attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_FUSED_LAYER = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_HEAD_WIDTHS = {1280: 80}  # ViT-H; all others 64


def is_official(tensors: Tensors) -> bool:
    """Whether a state dict is a Chinese CLIP of the official code (an OpenAI CLIP has no ``bert.``)."""
    names = {name.removeprefix("module.") for name in tensors}
    return "text_projection" in names and any(name.startswith("bert.embeddings.") for name in names)


def to_ours(tensors: Tensors) -> Tensors:
    """Official names → file names of our checkpoints, fp32. Pooler and position buffers are dropped.

    Raises:
        RequestError: a tensor of no known name.
    """
    out: Tensors = {}
    plain = {_unfuse(name.removeprefix("module.")): tensor.float() for name, tensor in tensors.items()}
    is_vit = "visual.proj" in plain
    unknown = []
    for name, tensor in plain.items():
        if name.startswith("bert.pooler.") or name.endswith("position_ids"):
            continue
        if name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif name in _PLAIN and (is_vit or not name.startswith("visual.")):
            out[_PLAIN[name]] = tensor
        elif name.startswith("bert.") and ".Wqkv." in name:
            before, part = name.removeprefix("bert.").split("Wqkv.")
            for which, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"text_model.{before}{which}.{part}"] = chunk.contiguous()
        elif name.startswith("bert."):
            out[f"text_model.{name.removeprefix('bert.').replace('self.out_proj.', 'output.dense.')}"] = tensor
        elif is_vit and (match := _FUSED_LAYER.match(name)):
            for which, chunk in zip("qkv", tensor.chunk(3), strict=True):
                out[f"vision_model.encoder.layers.{match[1]}.self_attn.{which}_proj.{match[2]}"] = chunk.contiguous()
        elif is_vit and (match := _LAYER.match(name)) and match[2] in _LAYER_PARTS:
            out[f"vision_model.encoder.layers.{match[1]}.{_LAYER_PARTS[match[2]]}.{match[3]}"] = tensor
        elif not is_vit and name.startswith("visual."):
            out[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise RequestError(f"{len(unknown)} tensors are of no Chinese CLIP, e.g. {', '.join(unknown[:3])}")
    return out


def _unfuse(name: str) -> str:
    """Flash-attention names of the image tower → the plain ones."""
    return name.replace("attn.Wqkv.weight", "attn.in_proj_weight").replace("attn.Wqkv.bias", "attn.in_proj_bias") if (
        name.startswith("visual.")
    ) else name  # fmt: skip


def to_official(tensors: Tensors) -> Tensors:
    """File names of our checkpoints → official names without prefix; the exact inverse of `to_ours`."""
    out: Tensors = {}
    plain = {ours: theirs for theirs, ours in _PLAIN.items()}
    transposed = {ours: theirs for theirs, ours in _TRANSPOSED.items()}
    parts = {ours: theirs for theirs, ours in _LAYER_PARTS.items()}
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
            out[f"visual.transformer.resblocks.{match[1]}.{parts[match[2]]}.{match[3]}"] = tensor
    return out


def recognise(tensors: Tensors) -> Architecture:
    """The architecture from the shapes of tensors named as in our files; a published name where it is one."""
    text = TextTransformer(
        hidden=(hidden := tensors["text_model.embeddings.word_embeddings.weight"].shape[1]),
        layers=_count(tensors, r"text_model\.encoder\.layer\.(\d+)\."), heads=hidden // 64 or 1,
        intermediate=tensors["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0],
        vocabulary=tensors["text_model.embeddings.word_embeddings.weight"].shape[0],
        positions=tensors["text_model.embeddings.position_embeddings.weight"].shape[0],
    )  # fmt: skip
    projection = tensors["text_projection.weight"].shape[0]
    image: VisionTransformer | ResNet
    if "visual_projection.weight" in tensors:
        patch = tensors["vision_model.embeddings.patch_embedding.weight"]
        side = round((tensors["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
        width = patch.shape[0]
        image = VisionTransformer(
            hidden=width, layers=_count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
            heads=width // _HEAD_WIDTHS.get(width, 64) or 1, patch=patch.shape[-1], image_size=side * patch.shape[-1],
            intermediate=tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        )  # fmt: skip
    else:
        width = tensors["visual.conv1.weight"].shape[0] * 2
        stages = _count(tensors, r"visual\.layer(\d+)\.", first=1)
        layers = tuple(_count(tensors, rf"visual\.layer{number}\.(\d+)\.") for number in range(1, stages + 1))
        side = round((tensors["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        image = ResNet(layers, width, width * 32 // 64, side * 4 * 2 ** (stages - 1))
    for known in ARCHITECTURES.values():
        if known.hub and _same(known, image, text, projection):
            return known
    return Architecture("custom", image, text, projection)


def _count(tensors: Tensors, pattern: str, first: int = 0) -> int:
    return max(int(match[1]) for name in tensors if (match := re.match(pattern, name))) + 1 - first


def _same(known: Architecture, image, text: TextTransformer, projection: int) -> bool:
    def numbers(part) -> dict:
        values = {key: value for key, value in vars(part).items() if key not in ("heads", "dropout")}
        if "intermediate" in values:
            values["intermediate"] = values["intermediate"] or 4 * values["hidden"]
        return values

    return known.projection == projection and numbers(known.image) == numbers(image) and numbers(known.text) == numbers(text)
