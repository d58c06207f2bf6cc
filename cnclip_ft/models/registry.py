"""Which families of models there are: their kinds of towers and tokenizers, by name.

A new family is a module with a `FAMILY`, named in `FAMILIES`; code from outside calls `register`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.family import Family

FAMILIES = (
    "cnclip_ft.models.families.chinese_clip.family",
    "cnclip_ft.models.families.clip.family",
    "cnclip_ft.models.families.clip.metaclip_2",
    "cnclip_ft.models.families.altclip.family",
    "cnclip_ft.models.families.siglip.family",
    "cnclip_ft.models.families.encoder.family",
    "cnclip_ft.models.families.timm",
    "cnclip_ft.models.families.common",
    "cnclip_ft.models.families.imported",
)
# Kinds of descriptions that name none: they were written when there was one of each.
UNNAMED = {"text": "roberta", "tokenizer": "wordpiece"}
_registered: list[Family] = []


@cache
def _own_families() -> tuple[Family, ...]:
    return tuple(import_module(name).FAMILY for name in FAMILIES)


def register(family: Family) -> None:
    """Let a family that is not of this package be known in this process."""
    _registered[:] = [known for known in _registered if type(known) is not type(family)] + [family]


def families() -> list[Family]:
    return [*_own_families(), *_registered]


def image_kinds() -> dict[str, type[ImageTower]]:
    return {tower.kind: tower for family in families() for tower in family.image_towers}


def text_kinds() -> dict[str, type[TextTower]]:
    return {tower.kind: tower for family in families() for tower in family.text_towers}


def tokenizer_kinds() -> dict[str, type[Tokenizer]]:
    return {tokenizer.kind: tokenizer for family in families() for tokenizer in family.tokenizers}


def tokenizer_kind(described: dict[str, Any]) -> type[Tokenizer]:
    """Of what a checked description says of the tokenizer."""
    return tokenizer_kinds()[described.get("kind", UNNAMED["tokenizer"])]


def family_of(tower: TextTower) -> Family:
    """Who brings the tower; what a checkpoint is to other libraries goes by its text tower, as pictures may come from anywhere."""
    return next(family for family in families() if type(tower) in family.text_towers)


def text_kind(described: dict[str, Any]) -> type[TextTower]:
    """Of the text half of a checked description."""
    return text_kinds()[described.get("kind", UNNAMED["text"])]
