"""transformers' layers without the work nobody looks at: other tokens of the last layer, and padding on the CPU.

Where a tower reads ``[CLS]`` alone, the other tokens of its last layer give keys and values and are left at that, forward
and backward: 7 % of a tower of 12 layers, a fourth of one of 3. On the CPU texts are packed (`families.packing`). Parameters,
their names and the features are those of the plain layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer

from cnclip_ft.models.contract import LinearGroup
from cnclip_ft.models.families.packing import Packing, attend, dropout_share, read_rows, uses_sdpa


class TextLayer(ChineseCLIPTextLayer):
    """Post-norm: ``[n, tokens, width]`` as it is, or ``[tokens, width]`` with a `Packing` in the place of the mask."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        if not isinstance(attention_mask, Packing):
            return super().forward(hidden_states, attention_mask, **kwargs)
        own, packing = self.attention.self, attention_mask
        query, key, value = map(packing.spread, self.project(hidden_states))
        mixed = attend(
            query, key, value, own.num_attention_heads, packing.mask, dropout_share(own, own.attention_dropout)
        )
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
        heads, dropout = own.num_attention_heads, dropout_share(own, own.attention_dropout)
        if isinstance(packing, Packing):
            first = hidden_states.index_select(0, packing.starts)
            key, value = packing.spread(own.key(hidden_states)), packing.spread(own.value(hidden_states))
            mixed = attend(own.query(first)[:, None], key, value, heads, packing.mask, dropout)[:, 0]
        elif uses_sdpa(own.config):
            first = hidden_states[:, :1]
            mixed = attend(
                own.query(first), own.key(hidden_states), own.value(hidden_states), heads, attention_mask, dropout
            )
        else:
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        return self.feed_forward(mixed, first)


class ReadingVisionLayer(ChineseCLIPVisionLayer):
    """Pre-norm, a last layer: ``[n, tokens, width]`` → ``[n, 1, width]``."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        if not uses_sdpa(self.self_attn.config):
            return super().forward(hidden_states, attention_mask, **kwargs)[:, :1]
        return read_rows(self, hidden_states, attention_mask, slice(1))


def whole_layer(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``[n, tokens, width]`` → the same of every token, through a last layer of the image tower."""
    nobody: Any = None  # the library's type says every call has a mask
    return ChineseCLIPVisionLayer.forward(layer, hidden, nobody)


def skip_unread(layers: nn.ModuleList, *, first_token: bool) -> None:
    """Let transformers' `layers` leave out what nobody reads; `first_token`: the tower reads the first token alone."""
    # The class is changed and not the module: weights, their names and the order of random draws stay.
    text = isinstance(layers[0], ChineseCLIPTextLayer)
    if text:
        for layer in layers:
            layer.__class__ = TextLayer
    if first_token:
        layers[-1].__class__ = ReadingTextLayer if text else ReadingVisionLayer


def linear_groups(tower: nn.Module) -> list[LinearGroup]:
    """`TextTower.linear_groups` of a tower of these layers."""
    layers = [layer for layer in tower.modules() if type(layer) is TextLayer]
    of_layer = [(layer, layer.attention.self) for layer in layers]
    return [LinearGroup(layer, "project", [own.query, own.key, own.value]) for layer, own in of_layer]


def _add_and_norm(output: Any, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    hidden = output.dense(hidden)
    return output.LayerNorm((output.dropout(hidden) if output.training else hidden) + before)
