"""The RoBERTa text tower: transformers' ChineseCLIP text model with a projection, under its parameter names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import ChineseCLIPTextConfig, ChineseCLIPTextModel

from cnclip_ft.models.contract import LinearGroup, Tokenizer
from cnclip_ft.models.families.chinese_clip.catalog import TextTransformer
from cnclip_ft.models.families.chinese_clip.layers import linear_groups, skip_unread
from cnclip_ft.models.families.chinese_clip.wordpiece import CONTEXT_LENGTH, TextTokenizer
from cnclip_ft.models.families.fresh import from_recipe, keep_scale_
from cnclip_ft.models.families.numbers import TextNumbers
from cnclip_ft.models.families.packing import Packing, unasked, uses_sdpa
from cnclip_ft.models.families.parts import new_projection
from cnclip_ft.models.families.plain_attention import hiding, plain_post_norm_layers
from cnclip_ft.models.families.transformers_tower import ProjectedText
from cnclip_ft.models.schema import Share, Width
from data_tools.errors import RequestError


class RobertaNumbers(TextNumbers):
    """Of BERT's layers."""

    hidden_dropout_prob: Share
    attention_probs_dropout_prob: Share
    type_vocab_size: Width
    pad_token_id: Annotated[int, Field(ge=0)] | None


class Roberta(RobertaNumbers):
    kind: Literal["roberta"] = Field("roberta", exclude=True)  # descriptions are older than the word
    pooling: Literal["cls", "mean"] = "cls"


class RobertaTower(ProjectedText):
    """RoBERTa-style text tower: the last hidden state of ``[CLS]`` (or the mean of all tokens) through a projection.

    transformers' own pooler is never used: in a stand-alone text model it is random.
    """

    kind, schema = "roberta", Roberta
    layer_names = ("num_hidden_layers", r"text_model\.encoder\.layer\.(\d+)\.")
    config_keys = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
        "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    position_names = ("max_position_embeddings", "text_model.embeddings.position_embeddings.weight")

    def __init__(self, config: ChineseCLIPTextConfig, output_dim: int, pooling: str = "cls") -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise RequestError(f"text pooling is {pooling!r}: model.start.pooling=cls or model.start.pooling=mean")
        self.text_model = ChineseCLIPTextModel(config, add_pooling_layer=False)
        skip_unread(self.text_model.encoder.layer, first_token=pooling == "cls")
        self.text_projection = new_projection(config.hidden_size, output_dim)
        self.output_dim, self.pooling = output_dim, pooling
        self.max_length, self.vocab_size = config.max_position_embeddings, config.vocab_size

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> RobertaTower:
        return cls(ChineseCLIPTextConfig(**cls.own_numbers(numbers)), output_dim, numbers.get("pooling", "cls"))

    @classmethod
    def poolings(
        cls, numbers: dict[str, Any], names: Collection[str], tokenizer: Tokenizer
    ) -> dict[str, dict[str, Any]]:
        return {pooling: numbers | {"pooling": pooling} for pooling in ("cls", "mean")}

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int) -> RobertaTower:
        pooling = numbers.get("pooling", "cls")
        known = {key: value for key, value in numbers.items() if key != "pooling"}
        return cls.make(from_recipe(TextTransformer, known, "text"), output_dim, pooling)

    @classmethod
    def make(cls, numbers: TextTransformer, output_dim: int, pooling: str = "cls") -> RobertaTower:
        config = ChineseCLIPTextConfig(
            vocab_size=numbers.vocabulary,
            hidden_size=numbers.hidden,
            num_hidden_layers=numbers.layers,
            num_attention_heads=numbers.heads,
            intermediate_size=numbers.intermediate or 4 * numbers.hidden,
            max_position_embeddings=numbers.positions,
            hidden_dropout_prob=numbers.dropout,
            attention_probs_dropout_prob=numbers.dropout,
        )
        tower = cls(config, output_dim, pooling)
        keep_scale_(tower.text_model.encoder)
        return tower

    def describe(self) -> dict[str, Any]:
        return {"pooling": self.pooling} | {key: getattr(self.text_model.config, key) for key in self.config_keys}

    def tokenizer(self, context_length: int | None = None) -> TextTokenizer:
        return TextTokenizer(context_length=context_length or min(CONTEXT_LENGTH, self.max_length))

    def graph(self) -> nn.Module:
        return PlainRoberta(self)

    def linear_groups(self) -> list[LinearGroup]:
        return linear_groups(self)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and uses_sdpa(self.text_model.config):
            return self.text_projection(self._packed(input_ids, attention_mask))
        mask = unasked(attention_mask, self.text_model.config)
        hidden = self.text_model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return self.text_projection(hidden[:, 0])
        weight = attention_mask[..., None].to(hidden.dtype)
        return self.text_projection((hidden * weight).sum(1) / weight.sum(1))

    def _packed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``[n, width]``, computed without padding. Elsewhere than on the CPU, counting the tokens would wait for the device."""
        packing = Packing.of(attention_mask)
        hidden = packing.gather(self.text_model.embeddings(input_ids=input_ids))
        for layer in self.text_model.encoder.layer:
            hidden = layer(hidden, packing)
        if self.pooling == "cls":
            return hidden
        lengths = attention_mask.sum(1, keepdim=True).to(hidden.dtype)
        return packing.spread(hidden).sum(1) / lengths

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last."""
        return [self.text_model.embeddings, *self.text_model.encoder.layer, self.text_projection]


class PlainRoberta(nn.Module):
    """`RobertaTower.forward` as a graph: attention as two products and a softmax, the mask one addition."""

    def __init__(self, tower: RobertaTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tower, model = self.tower, self.tower.text_model
        seen = attention_mask.bool()
        hidden = model.embeddings(input_ids=input_ids)
        mask = hiding(seen, hidden)[:, None, None]
        layers, first = model.encoder.layer, tower.pooling == "cls"
        hidden = plain_post_norm_layers(layers, hidden, mask=mask, first_token=first)
        if tower.pooling == "mean":
            weight = seen[..., None].to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        else:
            pooled = hidden[:, 0]
        return tower.text_projection(pooled)
