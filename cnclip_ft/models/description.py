"""What a file says a model is, checked before anything is built: every key known, every number in its bounds.

The bounds are far above every published size; they keep a description of a few bytes from laying out towers for ever.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers.activations import ACT2FN

from cnclip_ft.models.families.chinese_clip.catalog import Architecture
from data_tools.errors import RequestError

Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=1 << 13)]
Share = Annotated[float, Field(ge=0, lt=1)]
Small = Annotated[float, Field(gt=0, lt=1)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _agree(self) -> Part:
        heads, width = getattr(self, "num_attention_heads", 1), getattr(self, "hidden_size", 1)
        if width % heads:
            raise ValueError(f"hidden_size {width} cannot be divided by num_attention_heads {heads}")
        if getattr(self, "patch_size", 0) > getattr(self, "image_size", 0):
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if min(getattr(self, "std", None) or [1]) <= 0:
            raise ValueError(f"std {self.std} is not above 0")
        act = getattr(self, "hidden_act", "gelu")
        if act not in ACT2FN:
            raise ValueError(f"hidden_act {act[:40]!r} is no activation of transformers, e.g. gelu or quick_gelu")
        return self


class Vit(Part):
    kind: Literal["vit"]
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    image_size: Pixels
    patch_size: Pixels
    hidden_act: str
    layer_norm_eps: Small
    attention_dropout: Share
    mean: Colours | None = None
    std: Colours | None = None


class Resnet(Part):
    kind: Literal["resnet"]
    layers: Annotated[list[Layers], Field(min_length=1, max_length=8)]
    width: Width
    heads: Width
    image_size: Pixels
    mean: Colours | None = None
    std: Colours | None = None


class Foreign(Part):
    """A tower that is code: built only where the user allows it (`build.image_tower`)."""

    kind: Literal["foreign"]
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", max_length=300)]


class Text(Part):
    pooling: Literal["cls", "mean"] = "cls"
    vocab_size: Annotated[int, Field(ge=5, le=10_000_000)]
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
    pad_token_id: Annotated[int, Field(ge=0)] | None


class Description(Part):
    architecture: dict[str, Any] | None = None
    image: Annotated[Vit | Resnet | Foreign, Field(discriminator="kind")]
    text: Text
    projection: Width
    context_length: Annotated[int, Field(ge=3, le=1 << 16)]
    logit_bias: Literal[True] | None = None  # a tensor of that name is among the weights

    @model_validator(mode="after")
    def _fits(self) -> Description:
        positions = self.text.max_position_embeddings
        if self.context_length > positions:
            raise ValueError(
                f"context_length {self.context_length} is more than the text tower's {positions} positions"
            )
        return self


def checked_description(found: Any, where: str) -> dict[str, Any]:
    """A whole model's description out of a file.

    Raises:
        RequestError: naming `where`, the key, what was found and what is expected.
    """
    described = _checked(Description, found, f"{where}: it does not describe a model: model",
                         "The checkpoint is damaged, or was edited by hand; fetch it again")  # fmt: skip
    if described["architecture"] is not None:
        try:
            Architecture.from_dict(described["architecture"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RequestError(
                f"{where}: model.architecture is no entry of the catalogue; set it to null, or fetch the checkpoint again"
            ) from None
    if described["logit_bias"] is None:
        del described["logit_bias"]
    return described | {"image": {key: value for key, value in described["image"].items() if value is not None}}


def checked_half(kind: type[Vit | Text], found: dict[str, Any], where: str) -> dict[str, Any]:
    """One half, from another library's configuration: as above, under the names of that file."""
    made = _checked(kind, found, where, "Use the configuration that came with the weights")
    return {key: value for key, value in made.items() if value is not None or key == "pad_token_id"}


def _checked(kind: type[Part], found: Any, where: str, mend: str) -> dict[str, Any]:
    try:
        return kind.model_validate(found).model_dump()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    place = [str(part) for part in fault["loc"] if part not in ("vit", "resnet", "foreign")]
    if fault["type"].startswith("union_tag"):
        place.append("kind")
        fault["input"] = fault["input"].get("kind") if isinstance(fault["input"], dict) else fault["input"]
    key = ".".join([where, *place])
    if fault["type"] == "missing" or (fault["type"] == "union_tag_not_found" and fault["input"] is None):
        said = "is missing"
    elif fault["type"] == "extra_forbidden":
        said = "is a key that is not known here; a newer cnclip-ft may know it"
    else:
        expected = (
            "an object"
            if fault["type"] == "model_type"
            else fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        )
        shown = "" if fault["type"] == "value_error" else f"is {repr(fault['input'])[:60]}, expected: "
        said = f"{shown}{expected}"
    raise RequestError(f"{key} {said}. {mend}")
