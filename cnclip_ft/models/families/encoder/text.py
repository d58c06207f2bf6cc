"""A text encoder or decoder of transformers as a text tower: the library's own layers, one row of them, and a projection."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, NoReturn

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from cnclip_ft.models.contract import TextTower, Tokenizer
from cnclip_ft.models.families.encoder import transformers_model
from cnclip_ft.models.families.fast_tokenizer import FastTokenizer
from cnclip_ft.models.families.parts import new_projection, set_checkpointing
from cnclip_ft.models.known import TEXT_ENCODERS
from cnclip_ft.models.schema import TextPart, Width
from data_tools.errors import RequestError

Pooling = Literal["cls", "mean", "last", "eos", "pooler"]
POOLINGS = ("cls", "mean", "last", "eos", "pooler")
_TYPES = MODEL_FOR_MASKED_LM_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
_LONGEST = 1 << 16  # tokens


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a token sees those before it alone, so that only the last one has read the text."""
    kind = config.model_type
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (decoder or bool(getattr(config, "is_decoder", False))) and not getattr(
        config, "use_bidirectional_attention", False
    )


def configuration(model_type: str, numbers: dict[str, Any]) -> PretrainedConfig:
    """transformers' configuration of these numbers.

    Raises:
        ValueError: the type is no text encoder of transformers, or the numbers are not of it.
    """
    what = f"transformers has {', '.join(TEXT_ENCODERS)} and others like them"
    config = transformers_model.configuration(model_type, numbers, _TYPES, what, "text model")
    of_two = type(config)().is_encoder_decoder  # a file may say that the encoder alone is in it
    if of_two or None in (getattr(config, key, None) for key in ("hidden_size", "vocab_size")):
        raise ValueError(f"a model of type {model_type} is no encoder of texts by itself; {what}")
    return config


class Encoder(TextPart):
    kind: Literal["encoder"]
    model_type: Annotated[str, Field(max_length=60)]
    config: dict[str, Any]
    pooling: Pooling
    end_id: Annotated[int, Field(ge=0)] | None = None
    positions: Width
    head: Literal["linear", "mlp"] = "linear"
    origin: Annotated[str, Field(max_length=200)] | None = None

    @property
    def longest(self) -> int:
        return self.positions

    @model_validator(mode="after")
    def _agree(self) -> Encoder:
        configuration(self.model_type, self.config)
        if self.pooling == "eos" and self.end_id is None:
            raise ValueError("pooling eos without end_id")
        return self


def check_pooling(pooling: str, config: PretrainedConfig) -> None:
    """
    Raises:
        RequestError: there is no such row, or it has not read the text.
    """
    if pooling not in POOLINGS:
        raise RequestError(f"text pooling is {pooling!r}: model.start.pooling={'|'.join(POOLINGS)}")
    if pooling in ("cls", "pooler") and is_causal(config):
        raise RequestError(
            f"text pooling {pooling}: a {config.model_type} reads forwards, its first token has seen nothing: model.start.pooling=last or model.start.pooling=mean"
        )


class EncoderTower(TextTower):
    """transformers' `AutoModel` of a text encoder; of its last hidden states one row, through a projection.

    Args:
        pooling: ``cls`` the first token, ``mean`` of all but padding, ``last`` the last but padding, ``eos`` the first end
            token, ``pooler`` the library's own pooled output, which has weights.
        end_id: of the end token, for ``eos``.
        head: ``mlp`` is open_clip's projection of two maps with a GELU between, its middle half as wide as both ends together.
        origin: by what name open_clip has the encoder's configuration fetched.
    """

    kind, schema = "encoder", Encoder
    position_names = ("positions", "text_model.embeddings.position_embeddings.weight")  # of those that learn them
    file_prefixes = ("text_model.", "text_projection.")
    can_be_new = False

    def __init__(
        self,
        config: PretrainedConfig,
        output_dim: int,
        pooling: str,
        end_id: int | None = None,
        head: str = "linear",
        origin: str | None = None,
    ) -> None:
        super().__init__()
        check_pooling(pooling, config)
        config.use_cache = False
        model = transformers_model.laid_out(config)
        transformers_model.leave_mask_unread(model)
        transformers_model.leave_places_there(model)
        if pooling == "pooler" and not hasattr(model, "pooler"):
            raise RequestError(
                f"pooling pooler: a {config.model_type} of transformers has none: model.start.pooling=mean or model.start.pooling=cls"
            )
        if pooling != "pooler" and isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = None
        self.text_model = model
        self.head, self.origin = head, origin
        self.text_projection = self._new_head(output_dim)
        self.output_dim, self.pooling, self.end_id = output_dim, pooling, end_id
        self.max_length, self.vocab_size = _positions(model, config), config.vocab_size

    @classmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> EncoderTower:
        config = configuration(numbers["model_type"], numbers["config"])
        more = {key: numbers[key] for key in ("end_id", "head", "origin") if numbers.get(key) is not None}
        return cls(config, output_dim, numbers["pooling"], **more)

    @classmethod
    def poolings(
        cls, numbers: dict[str, Any], names: Collection[str], tokenizer: Tokenizer
    ) -> dict[str, dict[str, Any]]:
        end = tokenizer.ends_in if isinstance(tokenizer, FastTokenizer) else None
        without = {"cls", "pooler"} if is_causal(configuration(numbers["model_type"], numbers["config"])) else set()
        if not any(name.startswith("text_model.pooler.") for name in names):
            without.add("pooler")
        if end is None:
            without.add("eos")
        return {
            pooling: numbers | {"pooling": pooling} | ({"end_id": end} if pooling == "eos" else {})
            for pooling in POOLINGS
            if pooling not in without
        }

    @classmethod
    def with_positions(cls, numbers: dict[str, Any], count: int) -> dict[str, Any]:
        config, more = numbers["config"], count - numbers["config"]["max_position_embeddings"]
        changed = config | {"max_position_embeddings": count}
        return numbers | {"config": changed, "positions": numbers["positions"] + more}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model_type": self.text_model.config.model_type,
            "config": transformers_model.described(self.text_model.config),
            "pooling": self.pooling,
            "end_id": self.end_id,
            "positions": self.max_length,
            "head": self.head,
            "origin": self.origin,
        }

    @property
    def projection(self) -> nn.Module:
        return self.text_projection

    def replace_projection(self, output_dim: int) -> None:
        self.text_projection, self.output_dim = self._new_head(output_dim), output_dim

    def _new_head(self, output_dim: int) -> nn.Module:
        width = self.text_model.config.hidden_size
        if self.head == "linear":
            return new_projection(width, output_dim)
        middle = (width + output_dim) // 2
        return nn.Sequential(new_projection(width, middle), nn.GELU(), new_projection(middle, output_dim))

    def tokenizer(self, context_length: int | None = None) -> NoReturn:
        raise RequestError("an encoder of transformers comes with its own tokenizer; name the folder that holds both")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling == "pooler":
            return self.text_projection(out.pooler_output)
        hidden = out.last_hidden_state
        if self.pooling == "mean":
            weight = attention_mask[..., None].to(hidden.dtype)
            return self.text_projection((hidden * weight).sum(1) / weight.sum(1))
        if self.pooling == "cls":
            return self.text_projection(hidden[:, 0])
        ends = attention_mask.sum(1) - 1 if self.pooling == "last" else input_ids.eq(self.end_id or 0).int().argmax(1)
        row = ends[:, None, None].expand(-1, 1, hidden.shape[2])
        return self.text_projection(hidden.gather(1, row)[:, 0])

    def blocks(self) -> list[nn.Module]:
        """Embeddings first, then layers, the projection last; what follows the layers goes with the last one."""
        return [
            *transformers_model.stem_and_layers(self.text_model, self.text_model.config.num_hidden_layers),
            self.text_projection,
        ]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        owner = self.get_submodule(name.rpartition(".")[0])
        return parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        if wanted and not self.text_model.supports_gradient_checkpointing:
            return super().set_gradient_checkpointing(wanted)
        set_checkpointing(self.text_model, wanted)

    def example(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().example(count, length)
        if self.end_id is not None:
            ids[:, -1] = self.end_id
        return ids, mask


def _positions(model: Any, config: PretrainedConfig) -> int:
    """Longest text in tokens; RoBERTa and its like count their places from behind the pad's number."""
    most = getattr(config, "max_position_embeddings", None) or _LONGEST
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    pad = getattr(table, "padding_idx", None)
    return min(most - (0 if pad is None else pad + 1), _LONGEST)
