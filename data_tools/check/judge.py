"""What the numbers mean for training: leakage between splits, and what hurts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from data_tools.check.measure import SplitCheck
from data_tools.check.parallel import FACTOR, ParallelCheck
from data_tools.check.words import finding_words
from data_tools.faults import FILE_NAME
from data_tools.words import Said, said_in

_SHOWN = 12
# Shares above which something hurts rather than disturbs.
_REPEATED_IMAGES, _CUT, _DOUBTFUL = 0.01, 0.10, 0.05
MOST_TOKENS = 512  # that a recipe's data.context_length may be


@dataclass
class Leakage:
    """What two splits share by content."""

    first: str
    second: str
    images: int
    texts: int
    image_examples: list[list[Any]]  # [id in first, id in second]
    text_examples: list[str]


@dataclass
class Finding:
    """One thing worth saying; `hurts`: training or its scores suffer, and the check fails."""

    split: str
    hurts: bool
    kind: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        return finding_words(self.kind, self.values)[0]

    def sentence(self, language: str = "en") -> str:
        """What is wrong, and what to do."""
        problem, mend = finding_words(self.kind, self.values)
        return said_in(Said("{problem}. {mend}", "{problem}。{mend}", problem=problem, mend=mend), language).rstrip()

    def as_dict(self) -> dict[str, Any]:
        problem, mend = finding_words(self.kind, self.values)
        return {"split": self.split, "hurts": self.hurts, "problem": problem, "mend": mend, "kind": self.kind}


@dataclass
class CheckReport:
    splits: list[SplitCheck]
    leakage: list[Leakage] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def hurts(self) -> bool:
        return any(finding.hurts for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "splits": [split.as_dict() for split in self.splits],
            "leakage": [vars(leakage) for leakage in self.leakage],
            "findings": [finding.as_dict() for finding in self.findings],
            "hurts": self.hurts,
        }


def judge(splits: list[SplitCheck]) -> CheckReport:
    """Compare the splits with one another and say what is wrong."""
    report = CheckReport(splits)
    for first, second in combinations(splits, 2):
        images = first.image_hashes.keys() & second.image_hashes.keys()
        texts = first.text_hashes.keys() & second.text_hashes.keys()
        if images or texts:
            report.leakage.append(
                Leakage(
                    first.name,
                    second.name,
                    len(images),
                    len(texts),
                    [[first.image_hashes[h], second.image_hashes[h]] for h in sorted(images)[:_SHOWN]],
                    [first.text_hashes[h] for h in sorted(texts)[:_SHOWN]],
                )
            )
    for split in splits:
        report.findings += _of_split(split)
    for leakage in report.leakage:
        report.findings += _of_leakage(leakage, {split.name: split for split in splits})
    report.findings.sort(key=lambda finding: not finding.hurts)
    return report


def _of_split(split: SplitCheck) -> list[Finding]:
    found: list[Finding] = []

    def add(hurts: bool, kind: str, **values: Any) -> None:
        found.append(Finding(split.name, hurts, kind, values))

    if split.parallel is not None:
        found += _of_parallel(split.name, split.parallel)
    for what in ("checksum", "order", "images"):
        there, stated = getattr(split, what), getattr(split, f"stated_{what}", None)
        if stated is not None and there != stated:
            add(True, "changed", what=what, there=str(there)[:16], stated=str(stated)[:16])
    if split.boxes is not None and split.boxes.repeated:
        add(True, "repeated_boxes", count=split.boxes.repeated)
    if split.boxes is not None and split.boxes.whole:
        add(False, "whole_boxes", count=split.boxes.whole, share=split.boxes.whole / split.boxes.boxes)
    if split.undecodable:
        add(True, "undecodable", count=split.undecodable)
    if split.missing_images:
        add(True, "missing", count=split.missing_images)
    if not split.pairs and split.parallel is None:
        add(False, "no_pairs")
    if split.repeated_images:
        share = split.repeated_images / split.images
        add(share > _REPEATED_IMAGES, "repeated_images", count=split.repeated_images, share=share)
    if split.cut:
        most = split.token_lengths.most if split.token_lengths else 0
        add(
            split.cut > _CUT,
            "cut",
            share=split.cut,
            context_length=split.context_length,
            most=most,
            enough=min(most, MOST_TOKENS),
        )
    if split.images_without_text and split.pairs:
        add(False, "without_text", count=split.images_without_text)
    if split.lone_texts and split.pairs:
        add(False, "lone", count=split.lone_texts)
    if split.widths and split.heights and max(split.widths.median, split.heights.median) > 1024:
        add(False, "large", width=split.widths.median, height=split.heights.median)
    if split.skipped:
        count = sum(split.skipped.values())
        add(False, "skipped", count=count, kinds=split.skipped, file=f"{split.path}/{FILE_NAME}")
    return found


def _of_parallel(name: str, check: ParallelCheck) -> list[Finding]:
    found = []
    for kind in ("repeated", "untranslated", "doubtful"):
        count = getattr(check, kind)
        if count:
            share = count / check.rows
            values = {"count": count, "share": share, "factor": FACTOR}
            found.append(Finding(name, kind != "repeated" and share > _DOUBTFUL, f"{kind}_rows", values))
    if len(short := {language: rows for language, rows in check.languages.items() if rows < check.rows}):
        listed = ", ".join(f"{language} {rows:,}" for language, rows in short.items())
        found.append(Finding(name, False, "rows_without", {"listed": listed, "rows": check.rows}))
    return found


def _of_leakage(leakage: Leakage, splits: dict[str, SplitCheck]) -> list[Finding]:
    pair, found = f"{leakage.first} / {leakage.second}", []
    if leakage.images:
        found.append(Finding(pair, True, "shared_images", {"count": leakage.images}))
    if leakage.texts:
        share = leakage.texts / max(1, len(splits[leakage.second].text_hashes))
        values = {"count": leakage.texts, "share": share, "second": leakage.second}
        found.append(Finding(pair, False, "shared_texts", values))
    return found
