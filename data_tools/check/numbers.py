"""What the parts of the check count with: a distribution in five numbers, short hashes of pictures and texts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass


@dataclass
class Spread:
    """A distribution in five numbers."""

    least: int
    median: int
    p95: int
    most: int
    mean: float

    @classmethod
    def of(cls, counts: Counter[int]) -> Spread | None:
        total = counts.total()
        if not total:
            return None
        ordered = sorted(counts.items())

        def at(share: float) -> int:
            left = share * (total - 1)
            for value, count in ordered:
                left -= count
                if left < 0:
                    return value
            return ordered[-1][0]

        mean = sum(value * count for value, count in ordered) / total
        return cls(ordered[0][0], at(0.5), at(0.95), ordered[-1][0], round(mean, 2))


def short_hash(data: bytes) -> bytes:
    """16 bytes: enough to tell pictures and texts apart."""
    return hashlib.sha256(data).digest()[:16]


def same_text(text: str) -> bytes:
    """Equal captions up to case and spaces have equal hashes."""
    return short_hash(" ".join(text.lower().split()).encode("utf-8", "replace"))
