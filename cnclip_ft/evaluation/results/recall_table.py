"""Recall as a table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cnclip_ft.retrieval.recall import RetrievalScores
from data_tools import tables

KS = (1, 5, 10)


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Vertical bars in cells are escaped."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def recall_heads() -> list[str]:
    return ["", *(f"t2i R@{k}" for k in KS), *(f"i2t R@{k}" for k in KS), "mean recall", "t2i median", "i2t median"]


def benchmark_recall_heads() -> list[str]:
    """Of the first table of `benchmark`."""
    return ["test set", *recall_heads()[1:-2]]


def recall_cells(name: str, scores: RetrievalScores) -> list[str]:
    """One row under `recall_heads`: percentages, then median ranks; a dash where there is no ground truth."""
    both = (scores.text_to_image, scores.image_to_text)
    cells = [number(d.recall.get(k) if d else None) for d in both for k in KS]
    medians = [number(d.median_rank if d else None) for d in both]
    return [name, *cells, number(scores.mean_recall), *medians]


def recall_table(
    scores: Mapping[str, RetrievalScores],
    *,
    extra: Sequence[Sequence[str]] = (),
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """A row a split, the languages and groups of each below it, then the `extra` rows (published ones); `width` as for `tables.table`."""
    rows = []
    for name, score in scores.items():
        rows.append(recall_cells(name, score))
        parts = [*score.by_language.items(), *score.by_group.items()]
        rows += [recall_cells(f"  {name} · {label}", part) for label, part in parts]
    rows += map(list, extra)
    return markdown_table(recall_heads(), rows) if markdown else tables.table(recall_heads(), rows, width=width)
