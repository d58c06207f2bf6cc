"""What a file says a whole model is, checked before anything is built: each half by the schema its kind brings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from cnclip_ft.models.families.chinese_clip.catalog import Architecture
from cnclip_ft.models.heads import HeadsPart
from cnclip_ft.models.registry import UNNAMED, image_kinds, text_kinds, tokenizer_kinds
from cnclip_ft.models.schema import Part, TextPart, Width, checked
from data_tools.errors import RequestError


class Description(Part):
    architecture: dict[str, Any] | None = None
    image: dict[str, Any]
    text: dict[str, Any]
    projection: Width
    context_length: Annotated[int, Field(ge=3, le=1 << 16)]
    logit_bias: Literal[True] | None = None  # a tensor of that name is among the weights
    heads: HeadsPart | None = None  # that give boxes for phrases
    tokenizer: dict[str, Any] | None = None  # None is the kind of descriptions that are older than the word


def checked_description(found: Any, where: str) -> dict[str, Any]:
    """A whole model's description out of a file.

    Raises:
        RequestError: naming `where`, the key, what was found and what is expected.
    """
    place, mend = (
        f"{where}: it does not describe a model: model",
        "The checkpoint is damaged, or was edited by hand; fetch it again",
    )
    described = checked(Description, found, place, mend).model_dump()
    kind = described["image"].get("kind")
    if kind is None:
        raise RequestError(f"{place}.image.kind is missing. {mend}")
    text = described["text"].get("kind", UNNAMED["text"])
    for half, name, kinds in (("image", kind, image_kinds()), ("text", text, text_kinds())):
        if not isinstance(name, str) or name not in kinds:
            raise RequestError(f"{place}.{half}.kind is {repr(name)[:60]}, expected: {' or '.join(kinds)}. {mend}")
        part = checked(kinds[name].schema, described[half], f"{place}.{half}", mend)
        if isinstance(part, TextPart) and described["context_length"] > part.longest:
            raise RequestError(
                f"{place} context_length {described['context_length']} is more than the text tower's {part.longest} positions. {mend}"
            )
        described[half] = part.model_dump()
    if described["architecture"] is not None:
        try:
            Architecture.from_dict(described["architecture"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise RequestError(
                f"{where}: model.architecture is no entry of the catalogue; set it to null, or fetch the checkpoint again"
            ) from None
    tokenizer = described.pop("tokenizer")
    if tokenizer is not None:
        known, name = tokenizer_kinds(), tokenizer.get("kind")
        if not isinstance(name, str) or name not in known:
            raise RequestError(f"{place}.tokenizer.kind is {repr(name)[:60]}, expected: {' or '.join(known)}. {mend}")
        described["tokenizer"] = checked(known[name].schema, tokenizer, f"{place}.tokenizer", mend).model_dump()
    if described["logit_bias"] is None:
        del described["logit_bias"]
    if described["heads"] is None:
        del described["heads"]
    elif described["heads"]["dim"] != described["projection"]:
        raise RequestError(
            f"{place}.heads.dim is {described['heads']['dim']}, expected: {described['projection']}, as features are wide. {mend}"
        )
    return described | {"image": {key: value for key, value in described["image"].items() if value is not None}}


def checked_half(kind: type[Part], found: dict[str, Any], where: str) -> dict[str, Any]:
    """One half, from another library's configuration: as above, under the names of that file."""
    made = checked(kind, found, where, "Use the configuration that came with the weights").model_dump()
    return {key: value for key, value in made.items() if value is not None or key == "pad_token_id"}
