"""Tables of scores for the terminal and for Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from cnclip_ft.retrieval.recall import Direction, RetrievalScores

NOTHING = "–"


def display_width(text: str) -> int:
    """Columns a terminal needs: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def number(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(display_width(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell + " " * (width - display_width(cell)) if i == 0 else " " * (width - display_width(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(heads), "  ".join("─" * width for width in widths), *map(line, rows)])


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table; vertical bars in cells are escaped."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def recall_heads(ks: Sequence[int] = (1, 5, 10)) -> list[str]:
    return ["", *(f"t2i R@{k}" for k in ks), *(f"i2t R@{k}" for k in ks), "mean recall", "t2i median", "i2t median"]


def recall_cells(name: str, scores: RetrievalScores, ks: Sequence[int] = (1, 5, 10)) -> list[str]:
    """One row under `recall_heads`: percentages, then median ranks; a dash where there is no ground truth."""
    both = (scores.text_to_image, scores.image_to_text)
    cells = [number(d.recall.get(k) if d else None) for d in both for k in ks]
    medians = [number(d.median_rank if d else None) for d in both]
    return [name, *cells, number(scores.mean_recall), *medians]


def recall_table(
    scores: Mapping[str, RetrievalScores],
    ks: Sequence[int] = (1, 5, 10),
    *,
    markdown: bool = False,
    extra: Sequence[Sequence[str]] = (),
) -> str:
    """A row a split, the languages of each below it, then the `extra` rows (published ones)."""
    rows = []
    for name, score in scores.items():
        rows.append(recall_cells(name, score, ks))
        rows += [recall_cells(f"  {name} · {language}", part, ks) for language, part in score.by_language.items()]
    return (markdown_table if markdown else plain_table)(recall_heads(ks), [*rows, *extra])


def direction_line(name: str, direction: Direction | None) -> str:
    """One direction as a sentence for a log."""
    if direction is None:
        return f"{name}: no ground truth"
    recalls = "  ".join(f"R@{k} {value:.1f}" for k, value in direction.recall.items())
    return f"{name}: {recalls}  median rank {direction.median_rank:g}  ({direction.queries:,} queries, {direction.gallery:,} in the pool)"
