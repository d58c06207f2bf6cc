"""CLIP's text tower: transformers' CLIP text model with a projection, under its parameter names; MetaCLIP 2's beside it.

Causal and pre-norm; what is read is the first end-of-text token, to which all others are visible. OpenAI's first configurations
say ``eos_token_id: 2`` and mean the largest number in the text, which is that token too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from cnclip_ft.models.contract import LinearGroup
from cnclip_ft.models.families.clip.bpe import VOCABULARY, installed_bpe
from cnclip_ft.models.families.clip.layers import CausalLayer, skip_unread
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from cnclip_ft.models.families.fresh import from_recipe, keep_scale_
from cnclip_ft.models.families.numbers import TextNumbers
from cnclip_ft.models.families.packing import Packing, uses_sdpa
from cnclip_ft.models.families.parts import new_projection
from cnclip_ft.models.families.plain_attention import hiding, plain_layers
from cnclip_ft.models.families.transformers_tower import ProjectedText
from cnclip_ft.models.schema import Share, TextPart

LARGEST = 2  # an `eos_token_id` that means the largest number in the text, in CLIP's configurations


@dataclass(frozen=True)
class NewText:
    """A new text tower in a recipe."""

    hidden: int = 512
    layers: int = 12
    heads: int = 8
    intermediate: int | None = None  # None: 4 × hidden
    positions: int = 77
    activation: str = "quick_gelu"


class _Text(TextNumbers):
    attention_dropout: Share
    eos_token_id: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _agree(self) -> _Text:
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id {self.eos_token_id} is not below vocab_size {self.vocab_size}")
        return self


class ClipText(_Text):
    kind: Literal["clip_text"]


class ClipTextTower(ProjectedText):
    """transformers' CLIP text model, read at the end of the text, with its projection."""

    kind = "clip_text"
    schema: ClassVar[type[TextPart]] = ClipText
    layer_names = ("num_hidden_layers", r"text_model\.encoder\.layers\.(\d+)\.")
    config_keys = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "layer_norm_eps", "attention_dropout", "max_position_embeddings", "eos_token_id",
    )  # fmt: skip
    position_names = ("max_position_embeddings", "text_model.embeddings.position_embedding.weight")

    def __init__(self, config: CLIPTextConfig, output_dim: int) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(config)
        skip_unread(self.text_model.encoder.layers)
        self.text_projection = new_projection(config.hidden_size, output_dim)
        assert isinstance(config.eos_token_id, int)  # a description holds no other
        self.output_dim, self.eos = output_dim, config.eos_token_id
        self.max_length, self.vocab_size = config.max_position_embeddings, config.vocab_size

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> ClipTextTower:
        return cls(CLIPTextConfig(**cls.own_numbers(numbers), bos_token_id=None, pad_token_id=None), output_dim)

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int) -> ClipTextTower:
        found = from_recipe(NewText, numbers, "text")
        tower = cls.described(
            {
                "vocab_size": VOCABULARY,
                "hidden_size": found.hidden,
                "num_hidden_layers": found.layers,
                "num_attention_heads": found.heads,
                "intermediate_size": found.intermediate or 4 * found.hidden,
                "hidden_act": found.activation,
                "layer_norm_eps": 1e-5,
                "attention_dropout": 0.0,
                "max_position_embeddings": found.positions,
                "eos_token_id": VOCABULARY - 1,
            },
            output_dim,
        )
        keep_scale_(tower.text_model.encoder)
        return tower

    def tokenizer(self, context_length: int | None = None) -> FastTokenizer:
        return installed_bpe(context_length or self.max_length)

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where each text ends, int64 ``[n]``; 0 where it has no end."""
        return input_ids.argmax(1) if self.eos == LARGEST else input_ids.eq(self.eos).int().argmax(1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model, read = self.text_model, self.read(input_ids)
        layers: list[Any] = list(model.encoder.layers)
        if not uses_sdpa(model.config):
            hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return self.text_projection(hidden[torch.arange(len(read), device=read.device), read])
        hidden = model.embeddings(input_ids=input_ids)
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            # Elsewhere than on the CPU, counting the tokens would wait for the device.
            packing = Packing.of(torch.arange(input_ids.shape[1]) <= read[:, None])
            hidden = packing.gather(hidden)
            for layer in layers:
                hidden = layer(hidden, packing)
        else:
            for layer in layers[:-1]:
                hidden = layer(hidden, None, is_causal=True)
            hidden = layers[-1](hidden, None, read=read)
        return self.text_projection(model.final_layer_norm(hidden))

    def graph(self) -> nn.Module:
        return PlainClipText(self)

    def linear_groups(self) -> list[LinearGroup]:
        layers = [layer for layer in self.modules() if type(layer) is CausalLayer]
        of_layer = [(layer, layer.self_attn) for layer in layers]
        return [LinearGroup(layer, "project", [own.q_proj, own.k_proj, own.v_proj]) for layer, own in of_layer]

    def example(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().example(count, length)
        ids[:, -1] = self.vocab_size - 1 if self.eos == LARGEST else self.eos
        return ids, mask

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last."""
        model = self.text_model
        layers = list(model.encoder.layers)
        return [
            model.embeddings,
            *layers[:-1],
            nn.ModuleList([layers[-1], model.final_layer_norm]),
            self.text_projection,
        ]


class MetaClip2Text(_Text):
    kind: Literal["metaclip_2_text"]


class MetaClip2TextTower(ClipTextTower):
    """The same modules; an `eos_token_id` of 2 is XLM-V's end of text and means itself."""

    kind = "metaclip_2_text"
    schema: ClassVar[type[TextPart]] = MetaClip2Text

    def read(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.eq(self.eos).int().argmax(1)


class PlainClipText(nn.Module):
    """`ClipTextTower.forward` as a graph: attention as two products and a softmax, the mask one addition."""

    def __init__(self, tower: ClipTextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tower, model = self.tower, self.tower.text_model
        read = tower.read(input_ids)[:, None]
        hidden = model.embeddings(input_ids=input_ids)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        at = read[..., None].expand(-1, 1, hidden.shape[-1])
        hidden = plain_layers(
            model.encoder.layers,
            hidden,
            read=lambda tokens: tokens.gather(1, at),
            mask=hiding(place[None, :] <= place[:, None], hidden)[None, None],
            read_mask=hiding(place[None, :] <= read, hidden)[:, None, None],
        )
        return tower.text_projection(model.final_layer_norm(hidden[:, 0]))
