"""The check as tables in the terminal."""

from __future__ import annotations

from data_tools.check.judge import CheckReport
from data_tools.check.measure import BATCHES, SplitCheck, Spread
from data_tools.tables import fitted, table


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


def in_words(report: CheckReport, width: int | None = None) -> str:
    """One table of all splits side by side, then what was found; in lines of at most `width` columns."""
    columns = [dict(rows_of(split)) for split in report.splits]
    names = dict.fromkeys(name for column in columns for name in column)
    heads = ["least / median / 95 % / most", *(split.name for split in report.splits)]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    found = [
        f"{leakage.first} / {leakage.second}: {leakage.images:,} pictures and {leakage.texts:,} captions in both"
        for leakage in report.leakage
    ]
    for finding in report.findings:
        mark = "hurts" if finding.hurts else "note"
        found.append(f"{mark}: {finding.split}: {finding.problem}. {finding.mend}".rstrip())
    if not report.hurts:
        found.append("nothing here hurts training")
    return table(heads, rows, text=range(len(heads)), width=width) + "\n" + fitted("\n".join(found), width)
