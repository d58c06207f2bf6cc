"""SigLIP's text tower: every position sees every other, pads too, and the last one is the text's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import SiglipTextConfig, SiglipTextModel

from cnclip_ft.models.contract import TextTower, Tokenizer
from cnclip_ft.models.families.numbers import TextNumbers
from cnclip_ft.models.families.plain_attention import plain_layers
from cnclip_ft.models.families.siglip.layers import read_last
from cnclip_ft.models.families.transformers_tower import TransformersTower
from cnclip_ft.models.schema import Share
from data_tools.errors import RequestError


class SiglipText(TextNumbers):
    kind: Literal["siglip_text"]
    attention_dropout: Share


class SiglipTextTower(TransformersTower, TextTower):
    """transformers' SigLIP text model; its mask is never looked at, as pads were attended to when it was trained."""

    kind, schema = "siglip_text", SiglipText
    layer_names = ("num_hidden_layers", r"text_model\.encoder\.layers\.(\d+)\.")
    config_keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout",
    )  # fmt: skip
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
        config = cls.own_numbers(numbers) | {"bos_token_id": None, "eos_token_id": None}
        return cls(SiglipTextConfig(**config, projection_size=output_dim))

    @property
    def model(self) -> Any:
        return self.text_model

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


class PlainSiglipText(nn.Module):
    """`SiglipTextTower.forward` as a graph: attention as two products and a softmax."""

    def __init__(self, tower: SiglipTextTower) -> None:
        super().__init__()
        self.text_model = tower.text_model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model = self.text_model
        tokens = plain_layers(model.encoder.layers, model.embeddings(input_ids), read=lambda x: x[:, -1:])
        return model.head(model.final_layer_norm(tokens[:, 0]))
