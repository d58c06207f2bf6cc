"""What a file says of a part of a model, checked before anything is built: every key known, every number in its bounds.

The bounds are far above every published size; they keep a description of a few bytes from laying out towers for ever.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_tools.errors import RequestError

Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
MOST_PIXELS = 1 << 13  # of a side
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Vocabulary = Annotated[int, Field(ge=5, le=10_000_000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Small = Annotated[float, Field(gt=0, lt=1)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]


class Part(BaseModel):
    """Base of the schema a kind of tower or tokenizer brings: what it is called there, with bounds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Part):
    """Base of the schema of a text tower."""

    @property
    def longest(self) -> int:
        """Longest text the tower has positions for, in tokens."""
        raise TypeError(f"{type(self).__name__} does not say its longest text")


class PictureRule(Part):
    """What an image tower's schema holds of the way from a picture to its pixels; None is the kind's own."""

    fit: Literal["squash", "crop", "crop_even"] | None = None
    resample: Literal["bicubic", "bilinear"] | None = None
    mean: Colours | None = None
    std: Colours | None = None

    @model_validator(mode="after")
    def _positive(self) -> PictureRule:
        if min(self.std or [1]) <= 0:
            raise ValueError(f"std {self.std} is not above 0")
        return self


def checked(kind: type[Part], found: Any, where: str, mend: str) -> Part:
    """What was found, as `kind`.

    Raises:
        RequestError: naming `where`, the key, what was found and what is expected; it ends in `mend`.
    """
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    key = ".".join([where, *map(str, fault["loc"])])
    if fault["type"] == "missing":
        said = "is missing"
    elif fault["type"] == "extra_forbidden":
        said = "is a key that is not known here; a newer cnclip-ft may know it"
    else:
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = "an object" if fault["type"] in ("model_type", "dict_type") else message
        shown = "" if fault["type"] == "value_error" else f"is {repr(fault['input'])[:60]}, expected: "
        said = f"{shown}{expected}"
    raise RequestError(f"{key} {said}. {mend}")
