"""Every key a recipe may have, read off its schema: path, type, default, meaning; and which of them a misspelt one means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cnclip_ft.new_towers import NewResNet, NewText, NewTowers, NewVit
from cnclip_ft.recipe import Recipe
from cnclip_ft.recipe_section import OneOf
from cnclip_ft.recipe_stage import OBJECTIVES
from cnclip_ft.recipe_valid import ValidSet, kinds

STAGE, NAME = "STAGE", "NAME"  # stand in paths for names the user chooses
# What `model.start` may hold beside a name; its numbers alone are the recipe's matter.
_STARTS = (
    ("model.start", NewTowers),
    ("model.start.image", NewVit),
    ("model.start.image", NewResNet),
    ("model.start.text", NewText),
)


@dataclass(frozen=True)
class Key:
    """One line of the reference. `default` is YAML, None where the key is required; `type` is in English words."""

    path: str
    type: str
    default: str | None
    meaning: str
    words: tuple[str, ...] = ()  # all values it may have, where they are words


def keys() -> tuple[Key, ...]:
    """All keys, sections before what they hold."""
    return _keys(kinds(), tuple(OBJECTIVES))


@cache
def _keys(_kinds: tuple[type[ValidSet], ...], _objectives: tuple[str, ...]) -> tuple[Key, ...]:
    found = list(_walk(Recipe, ""))
    starts: dict[str, Key] = {}
    for path, model in _STARTS:
        for key in _walk(model, f"{path}."):
            other = starts.get(key.path)  # of another kind of tower
            if other is not None:
                types = " or ".join(dict.fromkeys((other.type, key.type)))
                key = Key(key.path, types, other.default if other.default == key.default else None, other.meaning)
            starts[key.path] = key
    after = next(n for n, key in enumerate(found) if key.path == "model.start") + 1
    return tuple(found[:after] + list(starts.values()) + found[after:])


def _walk(model: type[BaseModel], above: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        path = above + name
        sections = list(_sections(field.annotation))
        yield Key(
            path,
            _type(field.annotation, field.metadata),
            _default(field),
            field.description or "",
            _words(field.annotation),
        )
        for section, way in sections:
            yield from _walk(section, f"{path}{way}.")


def _words(annotation: Any) -> tuple[str, ...]:
    """All that may stand there, where nothing else may than these words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return ("true", "false")
    if origin is Literal:
        return tuple(map(str, inside))
    if origin in (Union, UnionType):
        every = [_words(each) for each in inside]
        return tuple(word for words in every for word in words) if all(every) else ()
    return ()


def _names(metadata: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name for each in metadata if isinstance(each, OneOf) for name in each.known)


def _sections(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Sections inside a type, and how the path goes on to them."""
    if annotation is ValidSet:
        yield from ((kind, "") for kind in kinds())
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
        return
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _sections(inside[0])
    elif origin in (Union, UnionType):
        for each in inside:
            yield from _sections(each)
    elif origin is dict:
        for section, way in _sections(inside[1]):
            yield section, f".{STAGE if section.__name__ == 'Stage' else NAME}{way}"
    elif origin is list:
        for section, way in _sections(inside[0]):
            yield section, f"[]{way}"


_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    metadata = list(metadata)
    if origin is Annotated:
        return _type(inside[0], [*inside[1:], *metadata])
    if origin in (Union, UnionType):
        # Limits that stand beside a union are its number's.
        return " or ".join(dict.fromkeys(_type(each, [] if each is type(None) else metadata) for each in inside))
    if origin is Literal:
        return ", ".join(str(value) for value in inside)
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is tuple:
        return f"[{', '.join(_type(each) for each in inside)}]"
    if origin is dict:
        return f"{{name: {_type(inside[1])}}}" if inside[1] is not Any else "section"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if annotation is str and (names := _names(metadata)):
        return ", ".join(names)
    if annotation is str and any("_place" in repr(each) for each in metadata):
        return "path"
    return _PLAIN[annotation] + (_limits(metadata) if annotation in (int, float) else "")


def _limits(metadata: Iterable[Any]) -> str:
    flat = [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
    said = {}
    for part in flat:
        for kind, sign in (
            (annotated_types.Ge, "≥"),
            (annotated_types.Gt, ">"),
            (annotated_types.Le, "≤"),
            (annotated_types.Lt, "<"),
        ):
            if isinstance(part, kind):
                limit = getattr(part, kind.__name__.lower())
                if abs(limit) < 1e6:  # larger ones are there to catch slips, not to be told
                    said[sign] = f"{sign} {limit:g}"
    return f" {', '.join(said.values())}" if said else ""


def _default(field: FieldInfo) -> str | None:
    value = field.default
    if value is PydanticUndefined:
        return None
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


# ---- which key was meant --------------------------------------------------------------------------------------------


def keys_at(where: list[str]) -> list[str]:
    """Names of the keys a section has; `where` is its path in a recipe."""
    pattern = _pattern(where)
    return [key.path.rpartition(".")[2] for key in keys() if key.path.rpartition(".")[0] == pattern]


def _pattern(where: list[str]) -> str:
    """The path as the reference writes it: STAGE and NAME for names, [] for numbers of a list."""
    parts: list[str] = []
    for number, part in enumerate(where):
        if number == 1 and where[0] == "stages":
            part = STAGE
        elif number == 2 and where[:2] == ["data", "valid"]:
            part = NAME
        if part.isdigit() and parts:
            parts[-1] += "[]"
        else:
            parts.append(part)
    return ".".join(parts)


def is_known(where: list[str]) -> bool:
    """Whether a recipe may have a key with this path."""
    if len(where) == 2 and where[0] == "stages" or len(where) == 3 and where[:2] == ["data", "valid"]:
        return True
    return _pattern(where) in {key.path for key in keys()} or where[:2] == ["model", "start"]


def is_plain(where: list[str]) -> bool:
    """Whether this is the path of a key that holds no others."""
    pattern = _pattern(where)
    return any(key.path == pattern and "section" not in key.type for key in keys())


def concrete(stages: Iterable[str]) -> list[tuple[str, Key]]:
    """Paths of the keys of a recipe with these stages, as far as they need no other names."""
    stages = list(stages)
    plain = [key for key in keys() if NAME not in key.path and "[]" not in key.path]
    return [(key.path.replace(STAGE, name), key) for key in plain for name in (stages if STAGE in key.path else [""])]


def meant(path: list[str], stages: Iterable[str]) -> list[str]:
    """Key paths of a recipe with these stages that an unknown `path` may mean, the likeliest first; those of all stages
    where the path only lacks its stage."""
    stages = list(stages)
    known = [path for path, key in concrete(stages) if not path.startswith("model.start.")]
    for lost in (path, path[1:], path[-1:]):  # whole, or begun with a wrong section
        ending = "." + ".".join(lost)
        ends = [each for each in known if ("." + each).endswith(ending)] if lost else []
        same = [each for each in ends if len(path) > 1 and path[-2] in each.split(".")]
        near = [each for each in ends if set(_close(path[1:2], stages)) & set(each.split("."))] if len(path) > 2 else []
        if ends:
            return near or same or ends
    section = {each.rpartition(".")[2]: each for each in known if each.split(".")[:-1] == path[:-1]}
    if found := _close(path[-1:], section):
        return [section[found[0]]]
    return _by_last(path[-1], known)


def _close(words: list[str], known: Iterable[str]) -> list[str]:
    return [found for word in words for found in difflib.get_close_matches(word, known, n=2, cutoff=0.75)]


def _by_last(word: str, known: list[str]) -> list[str]:
    found = difflib.get_close_matches(word, {each.rpartition(".")[2] for each in known}, n=1, cutoff=0.75)
    return [each for each in known if found and each.rpartition(".")[2] == found[0]]
