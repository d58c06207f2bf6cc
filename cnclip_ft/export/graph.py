"""The towers as they are written down for other runtimes: pixels or token ids in, unit features out.

The layers are transformers' own modules, called so that the graph stays plain: attention as two products and a softmax,
the mask one addition. Of the last layer only the token that is read is computed (keys and values still of all), which
saves most of one layer: 7 % of the time of 12 layers, a fifth of 4. What comes out is checked against the source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.families.chinese_clip.towers import ViTTower
from cnclip_ft.models.preprocessing import normalise

HIDDEN = -1e4  # on a score: its softmax is 0 in every precision, and it is a number in float16 too


class ImageEncoder(nn.Module):
    """uint8 ``[batch, 3, s, s]``, RGB → unit ``[batch, dim]`` fp32; normalisation is part of it."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower = model.image_tower
        self.dtype = model.dtype

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.tower
        if tower.input == "normalised":
            pixels = normalise(pixels, tower.mean, tower.std, self.dtype)
        trunk = _vit(tower, pixels) if isinstance(tower, ViTTower) else tower.trunk(pixels)
        return F.normalize(tower.project(trunk).float(), dim=1)


class TextEncoder(nn.Module):
    """int64 ``[batch, tokens]`` padded with the pad id → unit ``[batch, dim]`` fp32; the mask is made inside."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.pad_id = model.text_tower, model.tokenizer.pad_id

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        tower, model = self.tower, self.tower.text_model
        seen = input_ids != self.pad_id
        hidden = model.embeddings(input_ids=input_ids)
        mask = torch.where(seen, 0.0, HIDDEN).to(hidden.dtype)[:, None, None]
        layers = list(model.encoder.layer)
        for layer in layers:
            attention = layer.attention.self
            read = hidden[:, :1] if layer is layers[-1] and tower.pooling == "cls" else hidden
            mixed = _attend(
                attention.query(read), attention.key(hidden), attention.value(hidden),
                attention.num_attention_heads, mask,
            )  # fmt: skip
            hidden = layer.attention.output(mixed, read)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        if tower.pooling == "mean":
            weight = seen[..., None].to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        else:
            pooled = hidden[:, 0]
        return F.normalize(tower.text_projection(pooled).float(), dim=1)


def _vit(tower: ViTTower, pixels: torch.Tensor) -> torch.Tensor:
    """`ViTTower.trunk`: normalised ``[batch, 3, s, s]`` → ``[batch, width]``."""
    model = tower.vision_model
    hidden = model.pre_layrnorm(model.embeddings(pixels))
    layers = list(model.encoder.layers)
    for layer in layers:
        attention, all_tokens = layer.self_attn, layer.layer_norm1(hidden)
        read = all_tokens
        if layer is layers[-1]:
            read, hidden = all_tokens[:, :1], hidden[:, :1]
        mixed = _attend(
            attention.q_proj(read), attention.k_proj(all_tokens), attention.v_proj(all_tokens), attention.num_heads
        )
        hidden = hidden + attention.out_proj(mixed)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return model.post_layernorm(hidden[:, 0])


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``[batch, read, width]`` and twice ``[batch, tokens, width]`` → ``[batch, read, width]``."""
    width = query.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (heads, width)) for x in (query, key, value))
    scores = (q.transpose(1, 2) * width**-0.5) @ k.permute(0, 2, 3, 1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
