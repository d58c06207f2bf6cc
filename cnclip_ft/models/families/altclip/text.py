"""AltCLIP's text tower: XLM-R, a norm and a map to the teacher's width, and of that the first token, under transformers' names.

The layers are the post-norm ones of Chinese CLIP, which have the same parameters; positions are counted as in RoBERTa, from
behind the pad's number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import ChineseCLIPTextConfig, ChineseCLIPTextModel

from cnclip_ft.models.contract import LinearGroup, TextTower
from cnclip_ft.models.families.chinese_clip.layers import TextLayer, skip_unread
from cnclip_ft.models.families.numbers import check_activation, check_heads
from cnclip_ft.models.families.packing import Packing, unasked, uses_sdpa
from cnclip_ft.models.families.parts import new_projection, set_checkpointing
from cnclip_ft.models.families.plain_attention import HIDDEN, attend
from cnclip_ft.models.schema import Layers, Share, Small, TextPart, Vocabulary, Width
from data_tools.errors import RequestError

ROBERTA_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "layer_norm_eps", "pad_token_id",
)  # fmt: skip
TEXT_KEYS = (*ROBERTA_KEYS, "project_dim")


class AltText(TextPart):
    kind: Literal["altclip_text"]
    vocab_size: Vocabulary
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    intermediate_size: Width
    hidden_act: str
    hidden_dropout_prob: Share
    attention_probs_dropout_prob: Share
    max_position_embeddings: Width
    type_vocab_size: Width
    layer_norm_eps: Small
    pad_token_id: Annotated[int, Field(ge=0)]
    project_dim: Width

    @property
    def longest(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1

    @model_validator(mode="after")
    def _agree(self) -> AltText:
        check_heads(self.hidden_size, self.num_attention_heads)
        check_activation(self.hidden_act)
        if self.longest < 3:
            raise ValueError(f"max_position_embeddings {self.max_position_embeddings} leave no room for a text")
        return self


class AltRoberta(nn.Module):
    """The parts of AltCLIP's text model, by their names there; `AltTextTower` walks them."""

    def __init__(self, config: ChineseCLIPTextConfig, project_dim: int) -> None:
        super().__init__()
        self.roberta = ChineseCLIPTextModel(config, add_pooling_layer=False)
        self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transformation = nn.Linear(config.hidden_size, project_dim)


class AltTextTower(TextTower):
    kind, schema = "altclip_text", AltText
    layer_names = ("num_hidden_layers", r"text_model\.roberta\.encoder\.layer\.(\d+)\.")
    file_prefixes = ("text_model.", "text_projection.")
    position_names = ("max_position_embeddings", "text_model.roberta.embeddings.position_embeddings.weight")
    can_be_new = False

    def __init__(self, config: ChineseCLIPTextConfig, project_dim: int, output_dim: int) -> None:
        super().__init__()
        self.text_model = AltRoberta(config, project_dim)
        skip_unread(self.text_model.roberta.encoder.layer, first_token=True)
        self.text_projection = new_projection(project_dim, output_dim)
        self.output_dim, self.project_dim, self.vocab_size = output_dim, project_dim, config.vocab_size
        self.pad_id = config.pad_token_id or 0
        self.max_length = config.max_position_embeddings - self.pad_id - 1

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> AltTextTower:
        config = ChineseCLIPTextConfig(**{key: numbers[key] for key in ROBERTA_KEYS})
        return cls(config, numbers["project_dim"], output_dim)

    @property
    def projection(self) -> nn.Module:
        return self.text_projection

    def replace_projection(self, output_dim: int) -> None:
        self.text_projection, self.output_dim = new_projection(self.project_dim, output_dim), output_dim

    def describe(self) -> dict[str, Any]:
        config = self.text_model.roberta.config
        numbers = {key: getattr(config, key) for key in ROBERTA_KEYS}
        return {"kind": self.kind} | numbers | {"project_dim": self.project_dim}

    def tokenizer(self, context_length: int | None = None) -> NoReturn:
        raise RequestError("a text tower of AltCLIP comes with its own tokenizer; name the folder that holds both")

    def positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Number of each token's place, int64 ``[n, tokens]``; pads have their own."""
        real = (input_ids != self.pad_id).long()
        return real.cumsum(1) * real + self.pad_id

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model, places = self.text_model.roberta, self.positions(input_ids)
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and uses_sdpa(model.config):
            packing = Packing.of(attention_mask)
            first = packing.gather(model.embeddings(input_ids=input_ids, position_ids=places))
            for layer in model.encoder.layer:
                first = layer(first, packing)
        else:
            first = model(
                input_ids=input_ids, attention_mask=unasked(attention_mask, model.config), position_ids=places
            ).last_hidden_state[:, 0]
        return self._project(first)

    def _project(self, first: torch.Tensor) -> torch.Tensor:
        return self.text_projection(self.text_model.transformation(self.text_model.pre_LN(first)))

    def graph(self) -> nn.Module:
        return PlainAltText(self)

    def linear_groups(self) -> list[LinearGroup]:
        layers = [layer for layer in self.modules() if type(layer) is TextLayer]
        of_layer = [(layer, layer.attention.self) for layer in layers]
        return [LinearGroup(layer, "project", [own.query, own.key, own.value]) for layer, own in of_layer]

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last; norm and map to the teacher's width go with the last layer."""
        model = self.text_model
        layers = list(model.roberta.encoder.layer)
        last = nn.ModuleList([layers[-1], model.pre_LN, model.transformation])
        return [model.roberta.embeddings, *layers[:-1], last, self.text_projection]

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        set_checkpointing(self.text_model.roberta, wanted)


class PlainAltText(nn.Module):
    """`AltTextTower.forward` as a graph: attention as two products and a softmax, the mask one addition."""

    def __init__(self, tower: AltTextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tower, model = self.tower, self.tower.text_model.roberta
        hidden = model.embeddings(input_ids=input_ids, position_ids=tower.positions(input_ids))
        mask = torch.where(attention_mask.bool(), 0.0, HIDDEN).to(hidden.dtype)[:, None, None]
        layers: list[Any] = list(model.encoder.layer)
        for layer in layers:
            attention = layer.attention.self
            read = hidden[:, :1] if layer is layers[-1] else hidden
            mixed = attend(
                attention.query(read),
                attention.key(hidden),
                attention.value(hidden),
                attention.num_attention_heads,
                mask,
            )
            hidden = layer.attention.output(mixed, read)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return tower._project(hidden[:, 0])
