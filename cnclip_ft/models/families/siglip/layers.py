"""transformers' SigLIP layers without the work nobody looks at: other positions of a last layer, keys and values of a pooling.

The text tower reads its last position alone, so in its last layer all others give keys and values and are left at that. The
image tower's pooling has one query for every picture: the keys' map goes into the query, and the values' map is applied to the
weighted mean, so neither is computed for every patch (a sixth of a layer) or kept for the backward. Parameters, their names
and the features are those of the plain layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipMultiheadAttentionPoolingHead

from cnclip_ft.models.families.packing import read_rows, uses_sdpa


class ReadingLayer(SiglipEncoderLayer):
    """A last layer: ``[n, tokens, width]`` → ``[n, 1, width]``, the last position."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        if not uses_sdpa(self.self_attn.config):
            return super().forward(hidden_states, attention_mask, **kwargs)[:, -1:]
        return read_rows(self, hidden_states, None, slice(-1, None))


class PoolingHead(SiglipMultiheadAttentionPoolingHead):
    """``[n, tokens, width]`` → ``[n, width]``; a mask is bool ``[n, tokens]``, true for tokens that are looked at."""

    def forward(self, hidden_state: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        own = self.attention
        heads, width = own.num_heads, own.embed_dim
        to_query, to_key, to_value = own.in_proj_weight.chunk(3)
        bias = own.in_proj_bias.chunk(3)
        query = F.linear(self.probe[0], to_query, bias[0]).view(heads, 1, -1)
        # The keys' bias adds the same to every score of a head, which a softmax does not see.
        look = (query @ to_key.view(heads, -1, width))[:, 0] * (width // heads) ** -0.5
        scores = hidden_state @ look.T
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[..., None], torch.finfo(scores.dtype).min)
        mean = scores.softmax(1).transpose(1, 2).to(hidden_state.dtype) @ hidden_state
        value = (mean.transpose(0, 1) @ to_value.view(heads, -1, width).transpose(1, 2)).transpose(0, 1)
        pooled = own.out_proj(value.flatten(1) + bias[2])
        return pooled + self.mlp(self.layernorm(pooled))


def read_last(layers: nn.ModuleList) -> None:
    """Let transformers' `layers` leave out what is not read where only the last position is."""
    # The class is changed and not the module: weights, their names and the order of random draws stay.
    layers[-1].__class__ = ReadingLayer
