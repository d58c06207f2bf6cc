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

from cnclip_ft.models.contract import LinearGroup
from cnclip_ft.models.families.chinese_clip.layers import linear_groups, skip_unread
from cnclip_ft.models.families.chinese_clip.roberta import RobertaNumbers, RobertaTower
from cnclip_ft.models.families.packing import Packing, unasked, uses_sdpa
from cnclip_ft.models.families.parts import new_projection
from cnclip_ft.models.families.plain_attention import hiding, plain_post_norm_layers
from cnclip_ft.models.families.transformers_tower import ProjectedText
from cnclip_ft.models.schema import Width
from data_tools.errors import RequestError


class AltText(RobertaNumbers):
    kind: Literal["altclip_text"]
    pad_token_id: Annotated[int, Field(ge=0)]
    project_dim: Width

    @property
    def longest(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1

    @model_validator(mode="after")
    def _agree(self) -> AltText:
        if self.longest < 3:
            raise ValueError(f"max_position_embeddings {self.max_position_embeddings} leave no room for a text")
        return self


class AltRoberta(nn.Module):
    """The parts of AltCLIP's text model, by their names there; `AltTextTower` walks them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.roberta = ChineseCLIPTextModel(config, add_pooling_layer=False)
        self.pre_LN = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transformation = nn.Linear(config.hidden_size, config.project_dim)


class AltTextTower(ProjectedText):
    kind, schema = "altclip_text", AltText
    layer_names = ("num_hidden_layers", r"text_model\.roberta\.encoder\.layer\.(\d+)\.")
    config_keys = (*RobertaTower.config_keys, "project_dim")
    position_names = ("max_position_embeddings", "text_model.roberta.embeddings.position_embeddings.weight")
    can_be_new = False

    def __init__(self, config: Any, output_dim: int) -> None:
        super().__init__()
        self.text_model = AltRoberta(config)
        skip_unread(self.text_model.roberta.encoder.layer, first_token=True)
        self.text_projection = new_projection(config.project_dim, output_dim)
        self.output_dim, self.vocab_size = output_dim, config.vocab_size
        self.pad_id = config.pad_token_id or 0
        self.max_length = config.max_position_embeddings - self.pad_id - 1

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> AltTextTower:
        return cls(ChineseCLIPTextConfig(**cls.own_numbers(numbers)), output_dim)

    @property
    def model(self) -> Any:
        return self.text_model.roberta

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
        return linear_groups(self)

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last; norm and map to the teacher's width go with the last layer."""
        model = self.text_model
        layers = list(model.roberta.encoder.layer)
        last = nn.ModuleList([layers[-1], model.pre_LN, model.transformation])
        return [model.roberta.embeddings, *layers[:-1], last, self.text_projection]


class PlainAltText(nn.Module):
    """`AltTextTower.forward` as a graph: attention as two products and a softmax, the mask one addition."""

    def __init__(self, tower: AltTextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tower, model = self.tower, self.tower.text_model.roberta
        hidden = model.embeddings(input_ids=input_ids, position_ids=tower.positions(input_ids))
        mask = hiding(attention_mask.bool(), hidden)[:, None, None]
        hidden = plain_post_norm_layers(model.encoder.layer, hidden, mask=mask, first_token=True)
        return tower._project(hidden[:, 0])
