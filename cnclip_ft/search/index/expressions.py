"""Conditions on kept columns (`--where`) as Milvus expressions over the fields `columns` and `numbers` of a collection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_tools.columns import Condition, Where, number_of
from data_tools.errors import RequestError
from data_tools.store.layouts import Value

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def kept_fields(columns: Mapping[str, Value]) -> dict[str, Any]:
    """The fields of a row: the values themselves, and the numbers that conditions compare (``￥1,200`` is 1200)."""
    numbers = {name: number_of(value) for name, value in columns.items()}
    return {
        "columns": dict(columns),
        "numbers": {name: number for name, number in numbers.items() if number is not None},
    }


def expression(where: Where) -> str:
    """Holds for the pictures for which `where` does.

    Raises:
        RequestError: a name or value that Milvus has no way to write.
    """
    equal: dict[str, list[str]] = {}
    parts = []
    for condition in where.conditions:
        if condition.sign == "=":
            equal.setdefault(condition.name, []).append(_equal(condition))
        else:
            limit = number_of(condition.value)
            assert limit is not None, "parse_where has looked"
            parts.append(f"{_field('numbers', condition)} {condition.sign} {limit!r}")
    return " and ".join([*(f"({' or '.join(ways)})" for ways in equal.values()), *parts])


def _equal(condition: Condition) -> str:
    ways = [f'{_field("columns", condition)} == "{_escaped(condition.value)}"']
    if condition.value in ("True", "False"):
        ways.append(f"{_field('columns', condition)} == {condition.value.lower()}")
    number = number_of(condition.value)
    if number is not None:
        ways.append(f"{_field('numbers', condition)} == {number!r}")
    return " or ".join(ways)


def _field(field: str, condition: Condition) -> str:
    if any(sign in condition.name for sign in "\"'\\[]") or _CONTROL.search(condition.name):
        raise RequestError(
            f"{condition.name!r}: Milvus cannot be asked for a column of this name (quotation marks, brackets, backslashes); "
            "name the column otherwise where the store is built, or search an index in a folder"
        )
    return f'{field}["{condition.name}"]'


def _escaped(value: str) -> str:
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in value)
    if _CONTROL.search(escaped):
        raise RequestError(f"{value!r}: Milvus cannot be asked for control characters")
    return escaped
