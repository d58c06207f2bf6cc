"""Columns kept with a picture beside its texts: which values are kept, and conditions on them (`--where 类目=女装`)."""

from __future__ import annotations

import difflib
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.errors import RequestError
from data_tools.store.layouts import Value, is_text

LONGEST = 4096  # characters of a value; what is longer is no fact about a picture
_CONDITION = re.compile(
    r"""(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<name>[^=<>"][^=<>]*?))\s*(?P<sign><=|>=|=|<|>)\s*(?P<value>.*)""", re.DOTALL
)


def plain_value(value: Any) -> Value | None:
    """A cell as it is kept: text without blanks around it, a number, yes or no, a date as text; None: nothing to keep."""
    if isinstance(value, (bool, float)):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else None
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if isinstance(value, str):
        value = value.strip()
        return value if value and len(value) <= LONGEST and is_text(value) and "\0" not in value else None
    return None


def kept_columns(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Value]:
    """Those of `names` that a row says something of."""
    found = ((name, plain_value(row.get(name))) for name in names)
    return {name: value for name, value in found if value is not None}


def shown(columns: Mapping[str, Value]) -> str:
    """For people, on one line: ``类目 女装 · 价格 99``."""
    return " · ".join(f"{name} {value}" for name, value in columns.items())


_IN_A_PAGE = 60  # characters of a value below a thumbnail
_LINK = re.compile(r"https?://\S+", re.IGNORECASE)


def shown_in_page(columns: Mapping[str, Value]) -> str:
    """The same as HTML for below a thumbnail: a line each, long values cut, links to follow; nothing where nothing is kept."""
    lines = []
    for name, value in columns.items():
        text = str(value)
        said = html.escape(text if len(text) <= _IN_A_PAGE else text[: _IN_A_PAGE - 1] + "…")
        if _LINK.fullmatch(text):
            said = f"<a rel='noopener noreferrer' href='{html.escape(text)}'>{said}</a>"
        lines.append(f"<div class=kept>{html.escape(name)} {said}</div>")
    return "".join(lines)


@dataclass(frozen=True)
class Condition:
    """``name = value`` on the text of a value; ``<``, ``<=``, ``>``, ``>=`` on its number."""

    name: str
    sign: str
    value: str

    def __str__(self) -> str:
        return f"{_written(self.name)}{self.sign}{self.value}"

    def holds(self, columns: Mapping[str, Value]) -> bool:
        value = columns.get(self.name)
        if value is None:
            return False
        if self.sign == "=":
            return str(value) == self.value or number_of(value) == number_of(self.value) is not None
        own, limit = number_of(value), number_of(self.value)
        if own is None or limit is None:
            return False
        return {"<": own < limit, "<=": own <= limit, ">": own > limit, ">=": own >= limit}[self.sign]


def number_of(value: Value) -> float | None:
    """What conditions compare: thousands separators and a sign of ¥ or $ are passed over; None: no number."""
    try:
        number = float(str(value).replace(",", "").lstrip("¥￥$"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _written(name: str) -> str:
    """As a condition names the column: in quotation marks where it could be read otherwise."""
    plain = not any(sign in name for sign in '=<>"') and name == name.strip()
    return name if plain else '"' + name.replace('"', '""') + '"'


class Where:
    """Conditions that must all hold; several ``=`` on one column: one of them."""

    def __init__(self, conditions: Sequence[Condition] = ()) -> None:
        self.conditions = tuple(conditions)

    def __bool__(self) -> bool:
        return bool(self.conditions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and self.conditions == other.conditions

    def __hash__(self) -> int:
        return hash(self.conditions)

    def __str__(self) -> str:
        return ", ".join(map(str, self.conditions))

    def holds(self, columns: Mapping[str, Value]) -> bool:
        equal: dict[str, bool] = {}
        for condition in self.conditions:
            if condition.sign == "=":
                equal[condition.name] = equal.get(condition.name, False) or condition.holds(columns)
            elif not condition.holds(columns):
                return False
        return all(equal.values())

    def check(self, names: Sequence[str], place: object) -> None:
        """As `refuse_unknown`."""
        refuse_unknown([condition.name for condition in self.conditions], names, place)


def refuse_unknown(wanted: Iterable[str], names: Sequence[str], place: object) -> None:
    """Raises:
    RequestError: a column is none of `names`, which `place` keeps; the nearest is said.
    """
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            there = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names) or 'none'}"
            raise RequestError(f"{place} keeps no column {name!r}; {there}")


EVERYTHING = Where()


def parse_where(given: Sequence[str]) -> Where:
    """``类目=女装``, ``价格<100``; a name that holds a sign stands in quotation marks: ``"价格<元>"<100``.

    Raises:
        RequestError: one is no condition.
    """
    conditions = []
    for text in given:
        found = _CONDITION.fullmatch(text.strip())
        if found is None or (found["sign"] != "=" and number_of(found["value"]) is None):
            raise RequestError(
                f"--where {text!r} is no condition; write it like 类目=女装 or '价格<100', and '\"a=b\"=c' for a column a=b"
            )
        name = found["name"].strip() if found["quoted"] is None else found["quoted"].replace('""', '"')
        conditions.append(Condition(name, found["sign"], found["value"].strip()))
    return Where(conditions)
