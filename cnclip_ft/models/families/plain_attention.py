"""Attention for graphs of other runtimes: two products and a softmax, the mask one addition.

Of the last layer only the token that is read is computed (keys and values still of all), which saves most of one layer:
7 % of the time of 12 layers, a fifth of 4. What comes out is checked against the source when it is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_HIDDEN = -1e4  # on a score: its softmax is 0 in every precision, and it is a number in float16 too


def hiding(seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Bool, true where a token is seen → what is added to its scores, of the type of `tokens`."""
    return torch.where(seen, 0.0, _HIDDEN).to(tokens.dtype)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``[batch, read, width]`` and twice ``[batch, tokens, width]`` → ``[batch, read, width]``."""
    width = query.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (heads, width)) for x in (query, key, value))
    scores = (q.transpose(1, 2) * width**-0.5) @ k.permute(0, 2, 3, 1)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def plain_layers(
    layers: Iterable[Any],
    hidden: torch.Tensor,
    *,
    read: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
    mask: torch.Tensor | None = None,
    read_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """transformers' pre-norm layers on ``[batch, tokens, width]``; of the last one what `read` picks of the tokens comes out.

    Args:
        read_mask: of the last layer, where what is read has a mask of its own.
    """
    layers = list(layers)
    for layer in layers:
        attention, tokens = layer.self_attn, layer.layer_norm1(hidden)
        queries = tokens
        if layer is layers[-1]:
            queries, hidden, mask = read(tokens), read(hidden), mask if read_mask is None else read_mask
        mixed = attend(
            attention.q_proj(queries), attention.k_proj(tokens), attention.v_proj(tokens), attention.num_heads, mask
        )
        hidden = hidden + attention.out_proj(mixed)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden


def plain_post_norm_layers(
    layers: Iterable[Any], hidden: torch.Tensor, *, mask: torch.Tensor, first_token: bool
) -> torch.Tensor:
    """BERT's layers on ``[batch, tokens, width]``; `first_token`: of the last one that alone comes out."""
    layers = list(layers)
    for layer in layers:
        attention = layer.attention.self
        queries = hidden[:, :1] if first_token and layer is layers[-1] else hidden
        mixed = attend(
            attention.query(queries),
            attention.key(hidden),
            attention.value(hidden),
            attention.num_attention_heads,
            mask,
        )
        hidden = layer.attention.output(mixed, queries)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return hidden
