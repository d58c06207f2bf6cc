"""SigLIP's text tower: every position sees every other, pads too, and the last one is the text's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel

from cnclip_ft.models.contract import TextTower, Tokenizer
from cnclip_ft.models.families.numbers import check_activation, check_heads
from cnclip_ft.models.families.parts import set_checkpointing
from cnclip_ft.models.families.plain_attention import plain_layers
from cnclip_ft.models.families.siglip.layers import read_last
from cnclip_ft.models.schema import Layers, Share, Small, TextPart, Vocabulary, Width
from data_tools.errors import RequestError

TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip


class SiglipText(TextPart):
    kind: Literal["siglip_text"]
    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    max_position_embeddings: Width
    hidden_act: str
    layer_norm_eps: Small
    attention_dropout: Share

    @property
    def longest(self) -> int:
        return self.max_position_embeddings

    @model_validator(mode="after")
    def _agree(self) -> SiglipText:
        check_heads(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        return self


class SiglipTextTower(TextTower):
    """transformers' SigLIP text model; its mask is never looked at, as pads were attended to when it was trained."""

    kind, schema = "siglip_text", SiglipText
    layer_names = ("num_hidden_layers", r"text_model\.encoder\.layers\.(\d+)\.")
    file_prefixes = ("text_model.",)
    position_names = ("max_position_embeddings", "text_model.embeddings.position_embedding.weight")
    can_be_new = False  # it brings no vocabulary

    def __init__(self, config: SiglipTextConfig) -> None:
        super().__init__()
        self.text_model: Any = SiglipTextModel(config)
        read_last(self.text_model.encoder.layers)
        self.output_dim = self.text_model.head.out_features
        self.max_length, self.vocab_size = config.max_position_embeddings, config.vocab_size

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> SiglipTextTower:
        config = {key: value for key, value in numbers.items() if key in TEXT_KEYS}
        return cls(SiglipTextConfig(**config, projection_size=output_dim, bos_token_id=None, eos_token_id=None))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind} | {key: getattr(self.text_model.config, key) for key in TEXT_KEYS}

    @property
    def projection(self) -> nn.Module:
        return self.text_model.head

    def replace_projection(self, output_dim: int) -> None:
        width = self.text_model.config.hidden_size
        self.text_model.head, self.output_dim = nn.Linear(width, output_dim), output_dim
        nn.init.normal_(self.text_model.head.weight, std=width**-0.5)
        nn.init.zeros_(self.text_model.head.bias)

    def tokenizer(self, context_length: int | None = None) -> Tokenizer:
        raise RequestError(
            "SigLIP's text tower has no vocabulary of its own; put its tokenizer's files beside the weights"
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model = self.text_model
        tokens = model.embeddings(input_ids)
        for layer in model.encoder.layers:
            tokens = layer(tokens, None)
        return model.head(model.final_layer_norm(tokens[:, 0]))

    def graph(self) -> nn.Module:
        return PlainSiglipText(self)

    def blocks(self) -> list[nn.Module]:
        model = self.text_model
        *layers, last = model.encoder.layers
        return [model.embeddings, *layers, nn.ModuleList([last, model.final_layer_norm]), model.head]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        set_checkpointing(self.text_model, wanted)


class PlainSiglipText(nn.Module):
    """`SiglipTextTower.forward` as a graph: attention as two products and a softmax."""

    def __init__(self, tower: SiglipTextTower) -> None:
        super().__init__()
        self.text_model = tower.text_model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model = self.text_model
        tokens = plain_layers(model.encoder.layers, model.embeddings(input_ids), read=slice(-1, None))
        return model.head(model.final_layer_norm(tokens[:, 0]))
