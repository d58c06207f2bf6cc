"""The check as tables in the terminal."""

from __future__ import annotations

from data_tools.check.boxes import BoxCheck
from data_tools.check.judge import CheckReport
from data_tools.check.measure import BATCHES, KeptColumn, SplitCheck
from data_tools.check.numbers import Spread
from data_tools.check.parallel import ParallelCheck
from data_tools.check.words import kinds_in_words, piece, row_name
from data_tools.tables import fitted, table
from data_tools.words import said_in


def rows_of(split: SplitCheck, language: str = "en") -> list[tuple[str, str]]:
    """(what, value) of everything measured."""
    if split.parallel is not None:
        return _parallel_rows(split, split.parallel, language)
    lone = piece("lone", language, count=split.lone_texts) if split.lone_texts else ""
    rows = [
        ("images", f"{split.images:,}"),
        ("texts", f"{split.texts - split.lone_texts:,}{lone}"),
        ("pairs", f"{split.pairs:,}"),
        ("per_image", _spread(split.pairs_per_image)),
        ("images_without_text", f"{split.images_without_text:,}"),
        ("missing_images", f"{split.missing_images:,}"),
        ("repeated_texts", f"{split.repeated_texts:,}"),
        ("repeated_images", f"{split.repeated_images:,}"),
    ]
    named = [(row_name(name, language), value) for name, value in rows]
    for batch in BATCHES:
        rate = split.false_negatives[batch]
        shown = piece("smaller", language) if rate is None else piece("share", language, rate=rate)
        named.append((row_name("false_negatives", language, batch=batch), shown))
    if split.token_lengths:
        named.append((row_name("tokens", language), _spread(split.token_lengths)))
        named.append((row_name("cut", language, context_length=split.context_length), f"{split.cut:.2%}"))
    rows = [
        ("characters", _spread(split.characters)),
        ("languages", _counts(split.languages)),
        ("formats", _counts(split.formats)),
        ("modes", _counts(split.modes)),
        ("width", _spread(split.widths)),
        ("height", _spread(split.heights)),
        ("bytes", f"{split.bytes // split.images:,}" if split.images else "–"),
        ("undecodable" if split.decoded else "unreadable", f"{split.undecodable:,}"),
        ("skipped", said_in(kinds_in_words(split.skipped), language) or "0"),
        ("checksum", split.checksum[:16]),
    ]
    named += [(row_name(name, language), value) for name, value in rows]
    for name, column in split.kept.items():
        named.insert(-1, (row_name("kept", language, column=name), kept_in_words(column, language)))
    for kind, count in split.beside.items():
        named.insert(-1, (row_name(f"beside_{kind}", language), f"{count:,}"))
    if split.boxes is not None:
        found = split.boxes
        rows = [
            ("boxes", f"{found.boxes:,}"),
            ("per_phrase", _spread(found.per_pair)),
            ("areas", _spread(found.areas)),
            ("phrases", phrases_in_words(found)),
        ]
        named[-1:-1] = [(row_name(name, language), value) for name, value in rows]
    return named


def _parallel_rows(split: SplitCheck, found: ParallelCheck, language: str) -> list[tuple[str, str]]:
    rows = [("rows", f"{found.rows:,}"), ("languages", _counts(found.languages))]
    named = [(row_name(name, language), value) for name, value in rows]
    named += [(row_name("characters_of", language, of=of), _spread(each)) for of, each in found.characters.items()]
    if split.token_lengths:
        named.append((row_name("tokens", language), _spread(split.token_lengths)))
        named.append((row_name("cut", language, context_length=split.context_length), f"{split.cut:.2%}"))
    named += [(row_name("usual", language, pair=pair), f"{value:g}") for pair, value in found.usual.items()]
    rows = [
        ("repeated_rows", f"{found.repeated:,}"),
        ("untranslated", f"{found.untranslated:,}"),
        ("doubtful", f"{found.doubtful:,}"),
        ("skipped", said_in(kinds_in_words(split.skipped), language) or "0"),
        ("checksum", split.checksum[:16]),
    ]
    return named + [(row_name(name, language), value) for name, value in rows]


def phrases_in_words(found: BoxCheck) -> str:
    """``dog 106 (140), cat 105 (120)``: pairs and boxes of each; of many phrases their number and the first three."""
    few = found.phrases <= len(found.most)
    shown = ", ".join(f"{text} {pairs:,} ({boxes:,})" for text, pairs, boxes in (found.most if few else found.most[:3]))
    return shown if few else f"{found.phrases:,}: {shown} …"


def kept_in_words(column: KeptColumn, language: str) -> str:
    """``女装 106, 男装 105``, or how many values there are."""
    if column.values > len(column.most):
        return f"{column.images:,} ({piece('values', language, values=column.values)})"
    return ", ".join(f"{value} {count:,}" for value, count in column.most)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    if spread.least == spread.most:
        return f"{spread.least:,}"
    return f"{spread.least:,} / {spread.median:,} / {spread.p95:,} / {spread.most:,}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "–"


def in_words(report: CheckReport, width: int | None = None, language: str = "en") -> str:
    """One table of all splits side by side, what its cells mean, then what was found; in lines of at most `width` columns."""
    columns = [dict(rows_of(split, language)) for split in report.splits]
    names = dict.fromkeys(name for column in columns for name in column)
    heads = ["", *(split.name for split in report.splits)]
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    found = [piece("four", language)]
    if any(split.parallel is None for split in report.splits):
        found.append(piece("false", language))
    found += [
        piece(
            "shared", language, first=leakage.first, second=leakage.second, images=leakage.images, texts=leakage.texts
        )
        for leakage in report.leakage
    ]
    between = "：" if language == "zh" else ": "
    for finding in report.findings:
        mark = piece("hurts" if finding.hurts else "note", language)
        found.append(f"{mark}{between}{finding.split}{between}{finding.sentence(language)}")
    if not report.hurts:
        found.append(piece("fine", language))
    return table(heads, rows, text=range(len(heads)), width=width) + "\n" + fitted("\n".join(found), width)
