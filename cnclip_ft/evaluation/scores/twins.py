"""Is a picture nearer to its caption than to the caption's twin, the same sentence with one attribute swapped?

Recall hardly asks for that: few pools hold two captions that differ in a colour or a number alone. A model that guesses is right for half of
the twins; a tie counts against it. Twins are a function of the captions alone (`data_tools.negatives`), so that all models get the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from cnclip_ft.evaluation.results.recall_table import markdown_table, number
from cnclip_ft.features.encode import SplitFeatures, SplitTexts
from data_tools import tables
from data_tools.language import detect_language
from data_tools.negatives import KINDS, Kind, draw, mentioned, slots_of

CHANCE = 50.0
_AT_ONCE = 65_536  # rows whose cosines are computed together


@dataclass(frozen=True)
class Twin:
    """A pair of a split, as its `positives` have it, and its caption with one attribute swapped."""

    image: int
    text: int
    kind: Kind
    language: str
    swapped: str


def find_twins(split: SplitTexts) -> list[Twin]:
    """One twin for every kind of attribute of every pair, where there is one that no caption of the picture is equal to."""
    known = set().union(*map(mentioned, split.texts))
    captions: dict[int, set[str]] = {}
    for image, text in split.positives.tolist():
        captions.setdefault(image, set()).add(split.texts[text])
    twins = []
    for image, text in split.positives.tolist():
        caption = split.texts[text]
        language = split.languages[text] or detect_language(caption) or ""
        slots = slots_of(caption, KINDS, known)
        for kind in KINDS:
            drawn = draw([slot for slot in slots if slot.kind == kind], 5, Random(f"{caption}/{kind}"))
            swapped = next((sentence for _, sentence in drawn if sentence not in captions[image]), None)
            if swapped is not None:
                twins.append(Twin(image, text, kind, language, swapped))
    return twins


@dataclass(frozen=True)
class TwinScores:
    """``counts[kind, language]`` are (right, asked)."""

    counts: Mapping[tuple[str, str], tuple[int, int]]

    @property
    def accuracy(self) -> float | None:
        """Over all twins, in percent; None where there are none."""
        return self.of()[0]

    def of(self, kind: str | None = None, language: str | None = None) -> tuple[float | None, int]:
        """(accuracy in percent, twins) of one kind or all, in one language or all."""
        right = asked = 0
        for (of_kind, of_language), (r, n) in self.counts.items():
            if kind in (None, of_kind) and language in (None, of_language):
                right, asked = right + r, asked + n
        return (100 * right / asked if asked else None), asked

    @property
    def languages(self) -> list[str]:
        return sorted({language for _, language in self.counts})

    def value(self, name: str) -> float | None:
        """``accuracy``, or that of a kind by its name."""
        return self.of(None if name == "accuracy" else name)[0]

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"accuracy": self.accuracy, "twins": self.of()[1], "chance": CHANCE}
        for kind in KINDS:
            accuracy, asked = self.of(kind)
            by_language = {
                each: dict(zip(("accuracy", "twins"), self.of(kind, each), strict=True)) for each in self.languages
            }
            found[kind] = {"accuracy": accuracy, "twins": asked, "by_language": by_language}
        return found


def score_twins(features: SplitFeatures, swapped: torch.Tensor, twins: Sequence[Twin]) -> TwinScores:
    """`swapped`: unit float32 ``[twins, dim]``, the features of the twins' sentences."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for start in range(0, len(twins), _AT_ONCE):
        some = twins[start : start + _AT_ONCE]
        images = features.image_features[[twin.image for twin in some]]
        own = (images * features.text_features[[twin.text for twin in some]]).sum(1)
        other = (images * swapped[start : start + len(some)]).sum(1)
        for twin, right in zip(some, (own > other).tolist(), strict=True):
            r, n = counts.get((twin.kind, twin.language), (0, 0))
            counts[twin.kind, twin.language] = r + right, n + 1
    return TwinScores(counts)


def twin_table(scores: Mapping[str, TwinScores], *, markdown: bool = False, width: int | None = None) -> str:
    """A row a split, its languages below it, chance last; accuracies in percent, then how many twins were asked about."""
    heads = ["told from swapped", *KINDS, "all", "twins"]
    rows = []
    for name, found in scores.items():
        parts = [
            (name, None),
            *((f"  {name} · {each or '–'}", each) for each in found.languages if len(found.languages) > 1),
        ]
        for label, language in parts:
            every, asked = found.of(None, language)
            rows.append([label, *(number(found.of(kind, language)[0]) for kind in KINDS), number(every), f"{asked:,}"])
    rows.append(["chance", *[number(CHANCE)] * (len(KINDS) + 1), ""])
    return markdown_table(heads, rows) if markdown else tables.table(heads, rows, width=width)
