"""Texts of a batch behind one another, without padding; and attention over them spread out again.

On the CPU the tokens of a batch of texts lie behind one another for all products and norms, and are spread over a padded
batch for attention alone: captions of one batch differ in length, and a third of a padded batch is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Packing:
    """Where the tokens of `count` texts lie: `rows` int64 ``[tokens]`` into the padded batch ``[count · length]``.

    `mask` is bool ``[count, 1, 1, length]``, true for tokens; None where there is no padding. `starts` int64 ``[count]``:
    each text's first token among the tokens.
    """

    count: int
    length: int
    rows: torch.Tensor
    starts: torch.Tensor
    mask: torch.Tensor | None

    @staticmethod
    def of(attention_mask: torch.Tensor) -> Packing:
        """Of a mask ``[count, length]``: 1 for tokens, of which every text has at least one, and 0 for the padding after them."""
        real = attention_mask.bool()
        lengths = real.sum(1)
        mask = None if bool(real.all()) else real[:, None, None]
        count, length = real.shape
        return Packing(count, length, real.flatten().nonzero()[:, 0], lengths.cumsum(0) - lengths, mask)

    @property
    def ends(self) -> torch.Tensor:
        """Each text's last token among the tokens, int64 ``[count]``."""
        return torch.cat([self.starts[1:], self.starts.new_tensor([len(self.rows)])]) - 1

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[tokens, width]`` → ``[count, length, width]``, zeros for padding."""
        if self.mask is None:
            return tokens.view(self.count, self.length, -1)
        padded = tokens.new_zeros(self.count * self.length, tokens.shape[1])
        return padded.index_copy(0, self.rows, tokens).view(self.count, self.length, -1)

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """``[count, length, width]`` → ``[tokens, width]``."""
        flat = padded.flatten(0, 1)
        return flat if self.mask is None else flat.index_select(0, self.rows)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool = False,
) -> torch.Tensor:
    """Query ``[n, queries, width]``, key and value ``[n, tokens, width]`` → ``[n, queries, width]``.

    A mask for every token as query is cut to the first ones, as is the query.
    """
    query, key, value = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask[:, :, : query.shape[2]]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def read_rows(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """transformers' pre-norm `layer` on ``[n, tokens, width]``, of which the tokens `rows` alone come out."""
    own, normed = layer.self_attn, layer.layer_norm1(hidden)
    mixed = attend(
        own.q_proj(normed[:, rows]),
        own.k_proj(normed),
        own.v_proj(normed),
        own.num_heads,
        mask,
        dropout_share(own, own.dropout),
    )
    read = hidden[:, rows] + own.out_proj(mixed)
    return read + layer.mlp(layer.layer_norm2(read))


def unasked(attention_mask: torch.Tensor, config: Any) -> torch.Tensor:
    """The mask for transformers' model: in four dimensions it is taken as it is, in two it is asked whether there is padding at
    all, and the answer of a device is waited for."""
    return attention_mask.bool()[:, None, None] if uses_sdpa(config) else attention_mask


def uses_sdpa(config: Any) -> bool:
    """False where another kernel was asked for: it has its own shape of mask and its own rounding, and gets whole layers."""
    return config._attn_implementation == "sdpa"


def dropout_share(attention: nn.Module, share: float | None) -> float:
    return share or 0.0 if attention.training else 0.0
