"""Numbers of towers with new weights, as a recipe gives them, and pydantic's findings in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Numbers(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class NewTowers(Numbers):
    """``{image: …, text: …}`` as far as numbers go; names and files are the model's matter."""

    image: str | dict[str, Any] | None = None
    """A CLIP folder or file, an import path, `{path: …, activation: …}`, or a new tower `{kind: vit, …}`."""
    text: str | dict[str, Any] | None = None
    """A BERT or RoBERTa folder or file, or a new tower `{hidden: …, layers: …, heads: …}`."""
    projection: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Dimension of the features; null: the image tower's own, 512 where it has none."""
    pooling: str = "cls"
    """Which token stands for a text."""
    logit_scale: float | None = None
    """Logarithm of the temperature's inverse; null: the image tower's own, else ln(1/0.07)."""


def check_new_towers(start: dict[str, Any]) -> None:
    """The numbers of `model.start`, where it describes new towers.

    Raises:
        ValueError: naming each.
    """
    found = NewTowers.model_validate(start)
    if isinstance(found.image, dict) and "path" not in found.image:
        kinds: dict[str, type[NewTower]] = {"resnet": NewResNet, "vit": NewVit, "siglip": NewVit}
        kind = kinds.get(str(found.image.get("kind")))
        if kind is not None:
            kind.check(found.image, "image")
    if isinstance(found.text, dict) and found.text.get("kind", "roberta") == "roberta":
        NewText.check(found.text, "text")


class NewTower(Numbers):
    """Numbers of a tower with new weights; the defaults are the model's."""

    heads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Heads of the attention; they share the width evenly."""
    intermediate: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Width inside a layer; null: four times the width outside."""

    @classmethod
    def check(cls, numbers: dict[str, Any], tower: str) -> None:
        try:
            cls.model_validate(numbers)
        except ValidationError as error:
            raise ValueError("; ".join(fault_lines(error, f"{tower}."))) from None


class NewVit(NewTower):
    hidden: Annotated[int, Field(ge=1, le=65536)]
    """Width of the layers."""
    layers: Annotated[int, Field(ge=1, le=1000)]
    """Number of layers."""
    heads: Annotated[int, Field(ge=1, le=1024)]
    """Heads of the attention; they share the width evenly."""
    patch: Annotated[int, Field(ge=1, le=8192)]
    """Side of a patch in pixels."""
    image_size: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Side of the pictures in pixels."""

    @model_validator(mode="after")
    def _heads_share(self) -> NewVit:
        return _heads_share(self)


class NewResNet(NewTower):
    layers: Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=4, max_length=4)] = [3, 4, 6, 3]
    """Blocks of the four stages."""
    width: Annotated[int, Field(ge=2, le=4096)] = 64
    """Channels of the first stage."""
    image_size: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Side of the pictures in pixels."""


class NewText(NewTower):
    hidden: Annotated[int, Field(ge=1, le=65536)] = 768
    """Width of the layers."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 12
    """Number of layers."""
    heads: Annotated[int, Field(ge=1, le=1024)] = 12
    """Heads of the attention; they share the width evenly."""
    vocabulary: Annotated[int, Field(ge=1, le=10**7)] = 21128
    """Tokens the tower knows."""
    positions: Annotated[int, Field(ge=3, le=10**6)] = 512
    """Longest text in tokens it has positions for."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of activations that is dropped while it trains."""

    @model_validator(mode="after")
    def _heads_share(self) -> NewText:
        return _heads_share(self)


def _heads_share(tower: Any) -> Any:
    if tower.hidden % tower.heads:
        raise ValueError(f"hidden ({tower.hidden}) must be a multiple of heads ({tower.heads})")
    return tower


_KINDS = {"int", "str", "float", "bool", "none", "constrained-str", "constrained-int", "nullable"}


def fault_lines(
    error: ValidationError, above: str = "", known: Callable[[list[str], Any], str] | None = None
) -> list[str]:
    """One line a fault: key path, for which ``{here}`` stands in messages, what is wrong, what was found. `known` says of an unknown key's path and value what is."""
    lines = []
    for fault in error.errors(include_url=False):
        where = [str(part) for part in fault["loc"] if part not in _KINDS and not re.search(r"[\[(]", str(part))]
        key = (above + ".".join(where)).rstrip(".") or "the recipe"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{known(where, fault['input']) if known else ''}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            message = fault["msg"].removeprefix("Value error, ").replace("{here}", key)
            found = "" if isinstance(fault["input"], dict) else f" (found {short(fault['input'])})"
            lines.append(f"{key}: {message}{found}")
    lines = list(dict.fromkeys(lines))
    return lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else [])


def short(value: Any) -> str:
    try:
        said = repr(value)
    except ValueError:  # a number of thousands of digits
        said = "a very long number"
    return said if len(said) <= 80 else said[:77] + "…"
