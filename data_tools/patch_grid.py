"""How many patches high and wide a picture becomes: its own shape, within a budget (NaFlex, arXiv 2502.14786)."""

from __future__ import annotations

import math

_NEAR = (
    1e-5  # at which the search for the scale ends, as in transformers' Siglip2ImageProcessor: the sizes depend on it
)
_LARGEST = 100.0  # scale up


def patch_grid(height: int, width: int, patch: int, budget: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture of so many pixels: the largest scale at which both sides, rounded up to
    whole patches, stay within the budget."""

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in (height, width))
        return rows, columns

    low, high = _NEAR / 10, _LARGEST
    while high - low >= _NEAR:
        middle = (low + high) / 2
        rows, columns = at(middle)
        if rows * columns <= budget:
            low = middle
        else:
            high = middle
    rows, columns = at(low)
    # A line of more pixels than the smallest scale can bring down; transformers fails on it.
    return min(rows, budget), min(columns, max(budget // rows, 1))
