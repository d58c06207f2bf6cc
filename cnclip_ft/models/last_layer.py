"""The last layer of a tower that reads ``[CLS]`` alone: the other tokens give keys and values, and are left at that.

Nothing looks at what the last layer would make of them, forward or backward, so most of one layer's work is saved: 7 %
of a tower of 12 layers, a fourth of one of 3. Parameters, their names and the features are those of the whole layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer


class ReadingVisionLayer(ChineseCLIPVisionLayer):
    """Pre-norm: ``[n, tokens, width]`` → ``[n, 1, width]``."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        own = self.self_attn
        if not _can_read_alone(own, attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        normed = self.layer_norm1(hidden_states)
        mixed = _read(
            own.q_proj(normed[:, :1]), own.k_proj(normed), own.v_proj(normed),
            own.num_heads, attention_mask, own.dropout if self.training else 0.0,
        )  # fmt: skip
        hidden = hidden_states[:, :1] + own.out_proj(mixed)
        return hidden + self.mlp(self.layer_norm2(hidden))


class ReadingTextLayer(ChineseCLIPTextLayer):
    """Post-norm: ``[n, tokens, width]`` → ``[n, 1, width]``."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        own = self.attention.self
        if not _can_read_alone(own, attention_mask):
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        first = hidden_states[:, :1]
        mixed = _read(
            own.query(first), own.key(hidden_states), own.value(hidden_states),
            own.num_attention_heads, attention_mask, own.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.feed_forward_chunk(self.attention.output(mixed, first))


_READING = {ChineseCLIPVisionLayer: ReadingVisionLayer, ChineseCLIPTextLayer: ReadingTextLayer}


def read_first_token(layers: nn.ModuleList) -> None:
    """Let the last of `layers` compute its first token alone."""
    # The class is changed and not the module: weights, their names and the order of random draws stay.
    layers[-1].__class__ = _READING[type(layers[-1])]


def _can_read_alone(attention: nn.Module, mask: Any) -> bool:
    """Another kernel was asked for (it has its own shape of mask): the whole layer is computed."""
    return attention.config._attn_implementation == "sdpa" and (mask is None or mask.ndim == 4)


def _read(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """What the first token gathers: query ``[n, 1, width]``, key and value ``[n, tokens, width]`` → ``[n, 1, width]``."""
    query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask[:, :, :1]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)
