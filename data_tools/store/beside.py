"""What a pair may have beside its text: hard negatives, a weight, boxes. A record for each pair that has any (docs/store-format.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.errors import DataFault
from data_tools.store.layouts import Id, damaged_value, is_text

Beside = dict[str, Any]
KINDS = ("boxes", "negatives", "weight")
MOST = 1000  # boxes, or negatives, of a pair
LONGEST_NEGATIVE = 65_536  # characters
_LARGEST = 2**20  # bytes of a record
_ROUNDING = 1e-6  # that a box may lead out of its picture by


def beside_problem(found: Mapping[str, Any], text: str) -> str | None:
    """What is wrong with it; None: nothing.

    Args:
        found: any of ``negatives`` (texts, none of them `text` itself), ``weight`` (a number above 0) and ``boxes``
            (``[x, y, width, height]`` in shares of the upright picture, x and y the upper left corner).
    """
    if not found:
        return "there is nothing in it"
    for name, value in found.items():
        if name not in KINDS:
            return f"{name!r} is none of {', '.join(KINDS)}"
        problem = {"boxes": _boxes_problem, "negatives": _negatives_problem, "weight": _weight_problem}[name](value)
        if problem:
            return problem
    if text in found.get("negatives", ()):
        return "one of the negatives is the caption itself"
    return None


def _negatives_problem(value: Any) -> str | None:
    if type(value) is not list or not 1 <= len(value) <= MOST:
        return f"the negatives are {_shown(value)}, not a list of 1 to {MOST} texts"
    for one in value:
        if type(one) is not str or not one.strip() or "\0" in one or not is_text(one):
            return f"the negative {_shown(one)} is no text"
        if len(one) > LONGEST_NEGATIVE:
            return f"a negative has {len(one):,} characters, more than {LONGEST_NEGATIVE:,}"
    return None


def _weight_problem(value: Any) -> str | None:
    right = type(value) in (int, float) and 0 < value < math.inf
    return None if right else f"the weight is {_shown(value)}, not a number above 0"


def _boxes_problem(value: Any) -> str | None:
    if type(value) is not list or not 1 <= len(value) <= MOST:
        return f"the boxes are {_shown(value)}, not a list of 1 to {MOST} boxes"
    for box in value:
        if type(box) not in (list, tuple) or len(box) != 4 or not all(type(one) in (int, float) for one in box):
            return f"the box {_shown(box)} is not [x, y, width, height] in numbers"
        x, y, width, height = box
        if not (width > 0 and height > 0):
            return f"the box {_shown(box)} is empty: width and height are above 0"
        if not (0 <= x <= 1 and 0 <= y <= 1 and x + width <= 1 + _ROUNDING and y + height <= 1 + _ROUNDING):
            return f"the box {_shown(box)} leads out of the picture: all of it lies between 0 and 1"
    return None


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def beside_json(beside: Mapping[str, Any]) -> str:
    """As it is kept: the kinds in one order, numbers as floats."""
    plain = {name: beside[name] for name in KINDS if name in beside}
    if "weight" in plain:
        plain["weight"] = float(plain["weight"])
    if "boxes" in plain:
        plain["boxes"] = [[float(one) for one in box] for box in plain["boxes"]]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def checked_beside(beside: Mapping[str, Any], text: str, text_id: Id) -> Beside:
    """`beside` as it will be read back.

    Raises:
        DataFault: it is none; what is wrong is said.
    """
    problem = beside_problem(beside, text)
    if problem is None:
        record = beside_json(beside)
        if len(record.encode()) <= _LARGEST:
            found: Beside = json.loads(record)
            return found
        problem = f"it has more than {_LARGEST >> 10:,} KiB"
    mend = "Boxes are lists [x, y, width, height] in shares of the picture, negatives texts, a weight is above 0."
    raise DataFault(f"what stands beside the text: {problem}", mend=mend, kind="bad-beside", item_id=text_id)


def read_beside(value: bytes, number: int, file: Path) -> Beside:
    """The record of pair `number` in its shard.

    Raises:
        DataFault: it is none.
    """
    try:
        found = json.loads(value)
        right = type(found) is dict and beside_problem(found, "") is None
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise damaged_value(f"what stands beside pair {number} is no record of {', '.join(KINDS)}", file, number)
    return dict(found)


def are_counts(found: Any) -> bool:
    """Whether it is what `meta` says of them: how many pairs have any, and of each kind."""
    names = ("pairs", *KINDS)
    return type(found) is dict and all(type(found.get(name)) is int and 0 <= found[name] < 2**53 for name in names)
