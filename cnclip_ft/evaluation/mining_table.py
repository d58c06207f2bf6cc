"""What `mining` found, for people: a table by language, and examples."""

from __future__ import annotations

from collections import Counter

import torch

from cnclip_ft.evaluation.mining import Mined, Wishes
from cnclip_ft.features.encode import SplitFeatures
from data_tools.tables import table, terminal_width

_HEADS = ["language", "pairs", "asked for", "with negatives", "negatives a pair", "of the own score", "left out: over the limit", "own caption fits not"]  # fmt: skip


def lines(found: Mined, wishes: Wishes) -> list[str]:
    """For people: a table by language, and of all where there are several; what was left out and why."""
    counts, kinds = found.counts, Counter(found.languages)
    share = torch.where(found.texts >= 0, found.scores.double() / found.own[:, None], 0.0).sum(1)
    rows = []
    for name in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
        here = torch.tensor([name in ("all", language) for language in found.languages])
        negatives, some = int(counts[here].sum()), int((counts[here] > 0).sum())
        rows.append(
            [
                name or "none",
                f"{int(here.sum()):,}",
                f"{int((here & found.asked).sum()):,}",
                f"{some:,}",
                f"{negatives / some:.1f}" if some else "",
                f"{float(share[here].sum()) / negatives:.1%}" if negatives else "",
                f"{int(found.above[here].sum()):,}",
                f"{int((here & (found.own <= 0)).sum()):,}",
            ]
        )
    asker = "its picture" if wishes.by == "image" else "its caption"
    said = [
        table(_HEADS, rows, width=terminal_width()),
        f"for every pair the nearest captions of other pictures, at most {wishes.count}, as {asker} asks. Left out are those that score "
        f"{100 * wishes.below:g}% of what the own caption scores, or more; those that read like a caption of the picture; those of another language",
        f"pictures alike, which lend each other no negatives: {found.alike:,}",
    ]
    without = int((found.asked & (counts == 0)).sum())
    if without:
        said.append(f"without any: {without:,} pairs")
    return said


def examples(found: Mined, features: SplitFeatures, most: int = 3) -> list[str]:
    """Own captions with their nearest negatives and scores, of pairs evenly over the split."""
    rows = (found.counts > 0).nonzero()[:, 0]
    said = []
    for row in rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()].tolist() if len(rows) else ():
        image, text = found.pairs[row].tolist()
        said.append(f"{features.image_ids[image]}: {features.texts[text]} ({float(found.own[row]):.4f})")
        for place, score in list(zip(found.texts[row].tolist(), found.scores[row].tolist(), strict=True))[:3]:
            if place >= 0:
                said.append(f"  not: {features.texts[place]} ({score:.4f})")
    return said
