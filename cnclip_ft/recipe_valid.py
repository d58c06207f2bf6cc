"""Entries of `data.valid`: what each kind promises, which kinds there are, and the names of their scores.

A new kind is one file with a `ValidSet`, named in `KINDS`; code from outside calls `register`. The files lie in the room of
evaluation, above the recipe, and are found by name; reading a recipe imports nothing heavy with them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from pkgutil import resolve_name
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from cnclip_ft.recipe_section import Place, Section

# The first one is what a path alone means, and what the first entry is.
KINDS = (
    "cnclip_ft.evaluation.kinds.recall:ValidStore",
    "cnclip_ft.evaluation.kinds.zero_shot:ZeroShot",
    "cnclip_ft.evaluation.kinds.boxes:BoxesSplit",
)
_registered: list[type[ValidSet]] = []
_path = TypeAdapter(Place)


class ValidSet(Section):
    """Settings of one entry of `data.valid`. The first field is the key that tells its kind from the others."""

    scores: ClassVar[tuple[str, ...]]
    """Names that `best_by` may give, of values of what `judge` finds (`evaluation.kinds.contract.Scores`)."""
    decides: ClassVar[str | None] = None
    """The kind of stage whose best is chosen by the first of `scores`, where `best_by` says nothing."""

    @classmethod
    def key(cls) -> str:
        return next(iter(cls.model_fields))

    @classmethod
    def has_score(cls, score: str) -> bool:
        return score in cls.scores

    @classmethod
    def offer(cls) -> str:
        """What `best_by` may be, for a message."""
        return f"of {cls.key()} best_by='SPLIT: {'|'.join(cls.scores)}'"

    def places(self) -> list[str]:
        """Files and folders it names, what is judged first."""
        return [getattr(self, self.key())]

    def setting(self, above: str) -> str:
        """The key path of the first of `places`; `above` is that of the entry."""
        return f"{above}.{self.key()}"

    @abstractmethod
    def open(self, name: str, open_split: Callable[[str, str], Any]) -> Any:
        """An `evaluation.kinds.contract.Evaluator`; `open_split` opens a store, given its place and the setting that names it.

        Raises:
            RequestError: naming the setting that cannot be used.
        """


@cache
def _own_kinds() -> tuple[type[ValidSet], ...]:
    return tuple(resolve_name(name) for name in KINDS)


def kinds() -> tuple[type[ValidSet], ...]:
    return (*_own_kinds(), *_registered)


def register(kind: type[ValidSet]) -> None:
    """Let a kind that is not of this package be known in this process."""
    _registered[:] = [known for known in _registered if known.key() != kind.key()] + [kind]


def store_at(place: str) -> ValidSet:
    """What a path alone means."""
    kind = kinds()[0]
    return kind.model_validate({kind.key(): place})


def is_store(entry: Any) -> bool:
    return isinstance(entry, (str, kinds()[0]))


class AnyKind:
    """Beside the type of an entry: a path, or settings checked by the kind whose key stands there."""

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_entry)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, *(handler(kind.__pydantic_core_schema__) for kind in kinds())]}


def _entry(content: Any) -> str | ValidSet:
    if isinstance(content, ValidSet):
        return content
    return _kind(content).model_validate(content) if isinstance(content, dict) else _path.validate_python(content)


def _kind(content: dict[str, Any]) -> type[ValidSet]:
    for kind in kinds():
        if kind.key() in content:
            return kind
    nearest = max(kinds(), key=lambda kind: len(content.keys() & kind.model_fields.keys()))
    if content.keys().isdisjoint(nearest.model_fields):
        raise ValueError(f"nothing here says what is judged; {{here}} has one of {', '.join(k.key() for k in kinds())}")
    return nearest


def score_path(best_by: str) -> tuple[str | None, str]:
    """``"split: text_to_image.r1"`` → (split or None for the first, name of the score)."""
    split, colon, score = best_by.rpartition(":")
    score = score.strip()
    if not any(kind.has_score(score) for kind in kinds()):
        raise ValueError(f"'{best_by}' is not a score: {', '.join(kind.offer() for kind in kinds())}")
    return (split.strip() if colon else None), score
