"""What a store of parallel text holds: rows by language, their lengths, rows that repeat, translations that are doubtful."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data_tools.check.numbers import Spread, same_text
from data_tools.parallel import ParallelTexts

_SHOWN = 12
FACTOR = 3.0
"""A translation is doubtful where its length, beside that of its other language, is so many times more or less than usual."""
_ENOUGH = 8  # rows of two languages from which what is usual can be told


@dataclass
class ParallelCheck:
    """Lists of examples are short; the numbers beside them are complete."""

    rows: int
    languages: dict[str, int]  # language → rows that have it
    characters: dict[str, Spread | None]  # per language
    repeated: int  # rows whose texts another row has too, up to case and spaces
    untranslated: int  # rows with the same text in two languages
    doubtful: int  # rows with a length far from what is usual for their languages
    usual: dict[str, float] = field(default_factory=dict)  # ``zh/en`` → the median of characters in zh by those in en
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: value and vars(value) for name, value in self.characters.items()}
        return vars(self) | {"characters": plain}


def measure_parallel(texts: ParallelTexts) -> ParallelCheck:
    """Look at every row."""
    lengths: dict[str, Counter[int]] = {}
    seen: Counter[tuple[bytes, ...]] = Counter()
    ratios: dict[tuple[str, str], list[float]] = {}
    untranslated, same = 0, list[dict[str, str]]()
    for row in texts.rows:
        digests = {language: same_text(text) for language, text in sorted(row.items())}
        seen[tuple(digests.values())] += 1
        if len(set(digests.values())) < len(digests):
            untranslated += 1
            same.append(row)
        for language, text in row.items():
            lengths.setdefault(language, Counter())[len(text)] += 1
        for pair in _pairs(row):
            ratios.setdefault(pair, []).append(_ratio(row, pair))
    usual = {pair: statistics.median(found) for pair, found in ratios.items() if len(found) >= _ENOUGH}
    doubtful = [
        row
        for row in texts.rows
        if any(abs(_ratio(row, pair) - usual[pair]) > math.log(FACTOR) for pair in _pairs(row) if pair in usual)
    ]
    worst = sorted(doubtful, key=lambda row: -max(abs(_ratio(row, p) - usual[p]) for p in _pairs(row) if p in usual))
    return ParallelCheck(
        rows=len(texts),
        languages=texts.languages,
        characters={language: Spread.of(lengths[language]) for language in texts.languages},
        repeated=sum(count for count in seen.values() if count > 1),
        untranslated=untranslated,
        doubtful=len(doubtful),
        usual={"/".join(pair): round(math.exp(value), 3) for pair, value in usual.items()},
        examples={"doubtful": worst[:_SHOWN], "untranslated": same[:_SHOWN]},
    )


def _pairs(row: dict[str, str]) -> list[tuple[str, str]]:
    """Two languages each, every one beside the first in the order of the alphabet."""
    first, *others = sorted(row)
    return [(other, first) for other in others]


def _ratio(row: dict[str, str], pair: tuple[str, str]) -> float:
    """Logarithm of how much longer the one is than the other, in characters."""
    return math.log(len(row[pair[0]]) / len(row[pair[1]]))
