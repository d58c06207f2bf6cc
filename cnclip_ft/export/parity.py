"""The check every export ends with: features of the written files against those of the source."""

from __future__ import annotations

from data_tools.errors import UserError

TOLERANCE = 1e-4


def require_parity(difference: float, target: object) -> None:
    """Raise when unit fp32 features moved by more than 1e-4."""
    if not difference <= TOLERANCE:
        raise UserError(f"{target}: its features differ from the source by {difference:.2e} (limit {TOLERANCE:g}); do not use it")
