"""What the numbers mean for training: leakage between splits, and what hurts."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from data_tools.check.measure import SplitCheck

_SHOWN = 12
# Shares above which something hurts rather than disturbs.
_REPEATED_IMAGES, _CUT = 0.01, 0.10


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
    problem: str
    mend: str


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
            "findings": [vars(finding) for finding in self.findings],
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
                )  # fmt: skip
            )
    for split in splits:
        report.findings += _of_split(split)
    for leakage in report.leakage:
        report.findings += _of_leakage(leakage, {split.name: split for split in splits})
    report.findings.sort(key=lambda finding: not finding.hurts)
    return report


def _of_split(split: SplitCheck) -> list[Finding]:
    found: list[Finding] = []

    def add(hurts: bool, problem: str, mend: str) -> None:
        found.append(Finding(split.name, hurts, problem, mend))

    for what in ("checksum", "order", "images"):
        there, stated = getattr(split, what), getattr(split, f"stated_{what}", None)
        if stated is not None and there != stated:
            add(True, f"{what}: {str(there)[:16]} found, {str(stated)[:16]} stated by the store: something in it has changed",
                "Copy it again from where it is whole, or build it again.")  # fmt: skip
    if split.undecodable:
        add(
            True,
            f"{split.undecodable:,} images cannot be decoded",
            "Build again with --on-error skip, or replace them.",
        )
    if split.missing_images:
        add(True, f"{split.missing_images:,} pairs name an image that is not in the store", "Build the store again.")
    if not split.pairs:
        add(False, "no pairs: without answers it can be encoded and searched, not trained on or scored", "")
    if split.repeated_images:
        share = split.repeated_images / split.images
        add(
            share > _REPEATED_IMAGES,
            f"{split.repeated_images:,} images ({share:.1%}) have the content of another id: in a batch they are false negatives",
            "Give equal pictures one id.",
        )
    if split.cut:
        add(
            split.cut > _CUT,
            f"{split.cut:.1%} of the captions are longer than {split.context_length} tokens and will be cut",
            f"Raise data.context_length (the longest has {split.token_lengths.most} tokens)."
            if split.token_lengths
            else "",
        )
    if split.images_without_text and split.pairs:
        add(False, f"{split.images_without_text:,} images have no text: they only enlarge the gallery", "")
    if split.lone_texts and split.pairs:
        add(False, f"{split.lone_texts:,} texts have no image: they are neither trained on nor scored", "")
    if split.widths and split.heights and max(split.widths.median, split.heights.median) > 1024:
        add(False, f"the pictures are large (median {split.widths.median}×{split.heights.median}): decoding will slow training down",
            "Build with --max-side 512.")  # fmt: skip
    return found


def _of_leakage(leakage: Leakage, splits: dict[str, SplitCheck]) -> list[Finding]:
    pair, found = f"{leakage.first} / {leakage.second}", []
    if leakage.images:
        problem = f"{leakage.images:,} pictures are in both splits: scores will be too good"
        found.append(Finding(pair, True, problem, "Take them out of one."))
    if leakage.texts:
        share = leakage.texts / max(1, len(splits[leakage.second].text_hashes))
        problem = f"{leakage.texts:,} captions ({share:.1%} of {leakage.second}'s) are in both splits"
        found.append(Finding(pair, False, problem, "Normal for short captions; look at the examples if it is much."))
    return found
