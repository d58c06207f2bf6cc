"""transformers' causal pre-norm layers without the work nobody looks at: padding, and all but the token that is read.

What stands behind the token that is read cannot reach it, so no mask is needed anywhere: on the CPU the texts are packed up to
that token, elsewhere the padding behind it is computed and left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from cnclip_ft.models.families.packing import Packing, attend, dropout_share


class CausalLayer(CLIPEncoderLayer):
    """``[n, tokens, width]`` as it is, or ``[tokens, width]`` with a `Packing` in the place of the mask."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        packing = attention_mask
        if not isinstance(packing, Packing):
            return super().forward(hidden_states, attention_mask, **kwargs)
        own = self.self_attn
        query, key, value = map(packing.spread, self.project(self.layer_norm1(hidden_states)))
        mixed = attend(query, key, value, own.num_heads, None, dropout_share(own, own.dropout), causal=True)
        return self.feed_forward(packing.gather(mixed), hidden_states)

    def project(self, tokens: torch.Tensor) -> Iterable[torch.Tensor]:
        """``[tokens, width]`` → query, key and value of the same shape."""
        own = self.self_attn
        return own.q_proj(tokens), own.k_proj(tokens), own.v_proj(tokens)

    def feed_forward(self, mixed: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        hidden = before + self.self_attn.out_proj(mixed)
        return hidden + self.mlp(self.layer_norm2(hidden))


class ReadingCausalLayer(CausalLayer):
    """A last layer: ``[n, width]``, of ``[tokens, width]`` and a `Packing`, which ends where texts are read, or of
    ``[n, tokens, width]`` and `read`, the place in each text."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, read: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        packing, own = attention_mask, self.self_attn
        if read is None and not isinstance(packing, Packing):
            return CLIPEncoderLayer.forward(self, hidden_states, attention_mask, **kwargs)
        normed = self.layer_norm1(hidden_states)
        key, value = own.k_proj(normed), own.v_proj(normed)
        if read is None:
            before, query = hidden_states.index_select(0, packing.ends), normed.index_select(0, packing.ends)
            key, value, mask = packing.spread(key), packing.spread(value), packing.mask
        else:
            row = torch.arange(len(read), device=read.device)
            before, query = hidden_states[row, read], normed[row, read]
            mask = (torch.arange(normed.shape[1], device=read.device) <= read[:, None])[:, None, None]
        mixed = attend(own.q_proj(query)[:, None], key, value, own.num_heads, mask, dropout_share(own, own.dropout))
        return self.feed_forward(mixed[:, 0], before)


def skip_unread(layers: nn.ModuleList) -> None:
    """Let transformers' `layers` leave out what nobody reads."""
    # The class is changed and not the module: weights, their names and the order of random draws stay.
    for layer in layers:
        layer.__class__ = CausalLayer
    layers[-1].__class__ = ReadingCausalLayer
