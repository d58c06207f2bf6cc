"""transformers' layers without the work nobody looks at: other tokens of the last layer, and padding on the CPU.

Where a tower reads ``[CLS]`` alone, the other tokens of its last layer give keys and values and are left at that, forward
and backward: 7 % of a tower of 12 layers, a fourth of one of 3. On the CPU the tokens of a batch of texts lie behind one
another for all products and norms, and are spread over a padded batch for attention alone: captions of one batch differ
in length, and a third of a padded batch is padding. Parameters, their names and the features are those of the plain layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer


@dataclass(frozen=True)
class Packing:
    """Where the tokens of `count` texts lie: `rows` int64 ``[tokens]`` into the padded batch ``[count · length]``.

    `mask` is bool ``[count, 1, 1, length]``, true for tokens; None where there is no padding. `starts` int64 ``[count]``:
    each text's ``[CLS]`` among the tokens.
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
        return Packing(*real.shape, real.flatten().nonzero()[:, 0], lengths.cumsum(0) - lengths, mask)

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


class TextLayer(ChineseCLIPTextLayer):
    """Post-norm: ``[n, tokens, width]`` as it is, or ``[tokens, width]`` with a `Packing` in the place of the mask."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        if not isinstance(attention_mask, Packing):
            return super().forward(hidden_states, attention_mask, **kwargs)
        own, packing = self.attention.self, attention_mask
        query, key, value = map(packing.spread, self.project(hidden_states))
        mixed = _attend(query, key, value, own.num_attention_heads, packing.mask, _dropout(own, own.attention_dropout))
        return self.feed_forward(packing.gather(mixed), hidden_states)

    def project(self, tokens: torch.Tensor) -> Iterable[torch.Tensor]:
        """``[tokens, width]`` → query, key and value of the same shape."""
        own = self.attention.self
        return own.query(tokens), own.key(tokens), own.value(tokens)

    def feed_forward(self, mixed: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What comes after attention. transformers' modules around it would cost a short question 1 ms in a tower of 12."""
        between = _add_and_norm(self.attention.output, mixed, before)
        wide = self.intermediate.intermediate_act_fn(self.intermediate.dense(between))
        return _add_and_norm(self.output, wide, between)


class ReadingTextLayer(TextLayer):
    """A last layer: ``[n, 1, width]`` of ``[n, tokens, width]``, or ``[n, width]`` of ``[tokens, width]`` and a `Packing`."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        own, packing = self.attention.self, attention_mask
        heads, dropout = own.num_attention_heads, _dropout(own, own.attention_dropout)
        if isinstance(packing, Packing):
            first = hidden_states.index_select(0, packing.starts)
            key, value = packing.spread(own.key(hidden_states)), packing.spread(own.value(hidden_states))
            mixed = _attend(own.query(first)[:, None], key, value, heads, packing.mask, dropout)[:, 0]
        elif uses_sdpa(own.config):
            first = hidden_states[:, :1]
            mixed = _attend(
                own.query(first), own.key(hidden_states), own.value(hidden_states), heads, attention_mask, dropout
            )
        else:
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        return self.feed_forward(mixed, first)


class ReadingVisionLayer(ChineseCLIPVisionLayer):
    """Pre-norm, a last layer: ``[n, tokens, width]`` → ``[n, 1, width]``."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        own = self.self_attn
        if not uses_sdpa(own.config):
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        normed = self.layer_norm1(hidden_states)
        mixed = _attend(
            own.q_proj(normed[:, :1]), own.k_proj(normed), own.v_proj(normed),
            own.num_heads, attention_mask, _dropout(own, own.dropout),
        )  # fmt: skip
        hidden = hidden_states[:, :1] + own.out_proj(mixed)
        return hidden + self.mlp(self.layer_norm2(hidden))


def skip_unread(layers: nn.ModuleList, *, first_token: bool) -> None:
    """Let transformers' `layers` leave out what nobody reads; `first_token`: the tower reads the first token alone."""
    # The class is changed and not the module: weights, their names and the order of random draws stay.
    text = isinstance(layers[0], ChineseCLIPTextLayer)
    if text:
        for layer in layers:
            layer.__class__ = TextLayer
    if first_token:
        layers[-1].__class__ = ReadingTextLayer if text else ReadingVisionLayer


def uses_sdpa(config: Any) -> bool:
    """False where another kernel was asked for: it has its own shape of mask and its own rounding, and gets whole layers."""
    return config._attn_implementation == "sdpa"


def _dropout(attention: nn.Module, share: float) -> float:
    return share if attention.training else 0.0


def _add_and_norm(output: nn.Module, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    hidden = output.dense(hidden)
    return output.LayerNorm((output.dropout(hidden) if output.training else hidden) + before)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Query ``[n, queries, width]``, key and value ``[n, tokens, width]`` → ``[n, queries, width]``.

    A mask for every token as query is cut to the first ones, as is the query.
    """
    query, key, value = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    mask = None if mask is None else mask[:, :, : query.shape[2]]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)
