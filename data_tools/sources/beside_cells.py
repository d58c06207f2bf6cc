"""Cells of a row that say what its captions have beside them: hard negatives and a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from data_tools.errors import DataFault

NEGATIVES, WEIGHT = ("negatives", "负例"), ("weight", "probability", "权重")  # usual names of their columns
SEPARATOR = "|"  # between the negatives of a cell in a file without lists


def usual(names: Sequence[str], usual_names: Sequence[str]) -> str | None:
    """The first of `names` that is one of the usual ones, in any case; brackets count: ``weight (kg)`` is no weight of a pair."""
    return next((name for name in names if name.strip().casefold() in usual_names), None)


def beside_of(negatives: Any, weight: Any, captions: int, untyped: bool) -> list[dict[str, Any] | None]:
    """What each caption of a row has beside it.

    Args:
        negatives: texts that hold for all captions, or a list of them for each; in an `untyped` file one text, set apart by `|`.
        weight: a number for all captions, or a list with one for each.

    Raises:
        DataFault: a cell holds something else.
    """
    texts = [[]] * captions if _blank(negatives) else _negatives(negatives, captions, untyped)
    weights = [None] * captions if _blank(weight) else _weights(weight, captions)
    found: list[dict[str, Any] | None] = []
    for own, number in zip(texts, weights, strict=True):
        beside: dict[str, Any] = {"negatives": own} if own else {}
        found.append((beside | ({} if number is None else {"weight": number})) or None)
    return found


def _blank(cell: Any) -> bool:
    return (
        cell is None
        or (isinstance(cell, str) and not cell.strip())
        or (isinstance(cell, list) and all(one is None for one in cell))
    )


def _negatives(cell: Any, captions: int, untyped: bool) -> list[list[str]]:
    if isinstance(cell, str):
        cell = cell.split(SEPARATOR) if untyped else [cell]
    if isinstance(cell, list) and all(one is None or isinstance(one, list) for one in cell):
        if len(cell) != captions:
            raise _bad(f"{len(cell)} lists of negatives for {captions} captions")
        return [_texts(one or []) for one in cell]
    return [_texts(cell)] * captions


def _texts(cell: Any) -> list[str]:
    if not isinstance(cell, list) or not all(one is None or isinstance(one, str) for one in cell):
        raise _bad(f"the negatives are {cell!r:.60}")
    return list(dict.fromkeys(one.strip() for one in cell if one and one.strip()))


def _weights(cell: Any, captions: int) -> list[float | None]:
    if not isinstance(cell, list):
        return [_weight(cell)] * captions
    if len(cell) != captions:
        raise _bad(f"{len(cell)} weights for {captions} captions")
    return [None if _blank(one) else _weight(one) for one in cell]


def _weight(cell: Any) -> float:
    try:
        if isinstance(cell, bool) or not isinstance(cell, (int, float, str, Decimal)):
            raise ValueError
        number = float(cell)
        if not 0 < number < math.inf:
            raise ValueError
    except (ValueError, OverflowError):
        raise DataFault(
            f"the weight is {cell!r:.60}, not a number above 0",
            mend="It says how often the caption is drawn; a column that says something of the picture is kept with it by --keep-columns.",
            kind="bad-beside",
        ) from None
    return number


def _bad(problem: str) -> DataFault:
    mend = f"Write a list of texts, or one for each caption; in CSV, TSV and Excel texts with {SEPARATOR} between them."
    return DataFault(problem, mend=mend, kind="bad-beside")
