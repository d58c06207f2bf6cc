"""The check as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.check.judge import CheckReport
from data_tools.check.measure import BATCHES, SplitCheck, Spread


def rows_of(split: SplitCheck) -> list[tuple[str, str]]:
    """(what, value) of everything measured."""
    lone = f" + {split.lone_texts:,} without image" if split.lone_texts else ""
    rows = [
        ("images", f"{split.images:,}"),
        ("texts", f"{split.texts - split.lone_texts:,}{lone}"),
        ("pairs", f"{split.pairs:,}"),
        ("pairs per image", _spread(split.pairs_per_image)),
        ("images without text", f"{split.images_without_text:,}"),
        ("pairs without image", f"{split.missing_images:,}"),
        ("text on other images too", f"{split.repeated_texts:,}"),
        ("content under another id", f"{split.repeated_images:,}"),
    ]
    for batch in BATCHES:
        rate = split.false_negatives[batch]
        shown = f"{rate:.2%} of pairs" if rate is not None else "split is smaller"
        rows.append((f"false negatives at {batch:,}", shown))
    if split.token_lengths:
        rows.append(("caption tokens", _spread(split.token_lengths)))
        rows.append((f"cut at {split.context_length} tokens", f"{split.cut:.2%}"))
    rows += [
        ("caption characters", _spread(split.characters)),
        ("languages", _counts(split.languages)),
        ("formats", _counts(split.formats)),
        ("colour modes", _counts(split.modes)),
        ("width", _spread(split.widths)),
        ("height", _spread(split.heights)),
        ("bytes an image", f"{split.bytes // split.images:,}" if split.images else "–"),
        ("undecodable" if split.decoded else "unreadable headers", f"{split.undecodable:,}"),
        ("checksum", split.checksum[:16]),
    ]
    return rows


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    if spread.least == spread.most:
        return f"{spread.least:,}"
    # least / median / 95 % / most; the heading of the table says so
    return f"{spread.least:,} / {spread.median:,} / {spread.p95:,} / {spread.most:,}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "–"


def print_report(report: CheckReport, console: Console) -> None:
    """One table of all splits side by side, then what was found."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("least / median / 95 % / most")
    for split in report.splits:
        table.add_column(escape(split.name), overflow="fold")
    columns = [rows_of(split) for split in report.splits]
    names = dict.fromkeys(name for column in columns for name, _ in column)
    for name in names:
        table.add_row(name, *(escape(dict(column).get(name, "–")) for column in columns))
    console.print(table)
    for leakage in report.leakage:
        console.print(
            f"{leakage.first} / {leakage.second}: {leakage.images:,} pictures and {leakage.texts:,} captions in both",
            markup=False, highlight=False,
        )  # fmt: skip
    for finding in report.findings:
        mark = "hurts" if finding.hurts else "note"
        console.print(
            f"{mark}: {finding.split}: {finding.problem}. {finding.mend}".rstrip(), markup=False, highlight=False
        )
    if not report.hurts:
        console.print("nothing here hurts training", markup=False, highlight=False)
