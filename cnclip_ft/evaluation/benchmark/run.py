"""One model on the public test sets a folder holds: recall and zero-shot accuracy with intervals, published results beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.collectives import of_first, on_first, together
from cnclip_ft.evaluation.benchmark.sets import BenchmarkSet, Held, find_sets
from cnclip_ft.evaluation.classes.zero_shot import class_features, class_ranks, read_templates
from cnclip_ft.evaluation.encoding import Processes
from cnclip_ft.evaluation.options import Opened, Options, open_model
from cnclip_ft.evaluation.results import provenance, published
from cnclip_ft.evaluation.results.recall_table import KS, benchmark_recall_heads, markdown_table, number
from cnclip_ft.evaluation.scores.comparison import HitTable, Interval, hit_table, intervals
from cnclip_ft.features.encode import SplitTexts, evaluating
from cnclip_ft.features.official_files import write_json
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.features.sources import Source
from cnclip_ft.models.registry import family_of
from cnclip_ft.retrieval.recall import split_ranks
from data_tools.language import detect_language
from data_tools.tables import fitted, table

DRAWS, CONFIDENCE = 2000, 0.95
KIND = "benchmark"  # the key that tells its report from other commands'
_RECALLS = [f"{way} R@{k}" for way in ("text→image", "image→text") for k in KS] + ["mean recall"]
_ACCURACY_HEADS = ("test set", "top-1", "top-5")

Entry = dict[str, Any]


def run_benchmark(
    checkpoint: str | Path,
    data: Path,
    wanted: Sequence[BenchmarkSet],
    options: Options,
    *,
    language: str | None = None,
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Score `checkpoint` on what `data` holds of the sets; processes of a launcher encode in shares, the first one reports.

    Args:
        language: zh or en alone.
        json_file: written after every set. What it holds already of the same weights, settings and data is not done again; what it
            holds of the same weights and settings and other sets stays in it.

    Returns:
        The report: ``checkpoint``, ``settings``, ``missing`` and ``benchmark``, an entry a set and language; none on other processes.

    Raises:
        RequestError: nothing to score, or an option that cannot be used; nothing has been encoded.
        DataFault: a picture or a line is broken; what was done before it stands in `json_file`.
    """
    options.check()
    held, missing = find_sets(data, wanted, language)
    processes = Processes(options.device)
    opened = open_model(checkpoint, replace(options, device=processes.device))
    encoder = SharedEncoder(
        opened.model,
        workers=opened.workers,
        autocast=lambda: evaluating(opened.model, dtype=opened.dtype),
        batch_size=opened.batch_size,
    )
    described = opened.described()
    report: dict[str, Any] = {
        "format": provenance.FORMAT,
        **described,
        "data": str(data),
        "draws": DRAWS,
        "confidence": CONFIDENCE,
        "missing": [one.looked_for() for one in missing],
        "versions": provenance.versions(),
        KIND: [],
    }
    # The first process says what is done: another may see the file a moment later.
    done = of_first(_done(json_file, report) if json_file is not None and processes.index == 0 else {})
    size = provenance.size_name(opened.model)
    for one in held:
        keys = {name: _key(one, name, opened) for name in one.languages}
        before = {name: done[key] for name, key in keys.items() if key in done}
        if before and processes.index == 0:
            say(
                f"{one.about.name} ({', '.join(before)}): taken from {json_file}, which holds it of the same weights and data"
            )
        todo = [name for name in one.languages if name not in before]
        new: dict[str, Entry] = {}
        if todo:
            with together(opened.model.device):
                new = (_classified if one.about.classes else _retrieved)(one, todo, opened, options, encoder)
        if processes.index:
            continue
        for name in one.languages:
            entry = before.get(name) or {"key": keys[name], **new[name]}
            report[KIND].append(entry | _beside(one.about, entry, size))
        if json_file is not None:
            new_names = {_name(entry) for entry in report[KIND]}
            others = [entry for entry in done.values() if _name(entry) not in new_names]
            write_json(json_file, report | {KIND: [*report[KIND], *others]})  # a second stop loses nothing either
    return report


def _name(entry: Entry) -> tuple[str, str]:
    return entry["dataset"], entry["language"]


def _done(file: Path, report: Mapping[str, Any]) -> dict[str, Entry]:
    """Entries by key of an earlier report of the same weights and settings."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        same = provenance.weights_sum(found["checkpoint"]) == provenance.weights_sum(report["checkpoint"])
        alike = all(found[key] == report[key] for key in ("format", "settings", "draws", "confidence"))
        return {entry["key"]: entry for entry in found[KIND]} if same and alike else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _key(held: Held, language: str, opened: Opened) -> str:
    words: Any = None
    if language in held.classes:
        words = [[[c.key, c.names] for c in held.classes[language]], _sentences(held, language, opened)]
    asked = json.dumps([held.about.name, language, held.source.checksum, words], ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogateescape")).hexdigest()


def _retrieved(
    held: Held, languages: Sequence[str], opened: Opened, options: Options, encoder: SharedEncoder
) -> dict[str, Entry]:
    """Every language by itself: its texts among all pictures, which are encoded once, by all processes; the first one scores."""
    split = held.source.split
    places = sorted({place for one in languages for place in held.texts[one]})
    features = encoder.split(held.about.name, _with_texts(split, places), held.source.read)
    at = {place: number for number, place in enumerate(places)}
    entries: dict[str, Entry] = {}

    def score() -> None:
        for language in languages:
            own = features.with_texts(torch.tensor([at[place] for place in held.texts[language]], dtype=torch.int64))
            found = split_ranks(own, memory=options.memory, device=opened.device)
            scores = intervals(hit_table(own, found), draws=DRAWS, confidence=CONFIDENCE)
            entries[language] = _entry(held, language, scores) | {
                "images": len(own.image_ids),
                "texts": len(own.text_ids),
                "queries": {"text→image": len(found.text_ranks), "image→text": len(found.image_ranks)},
            }

    on_first(score, opened.model.device)
    return entries


def _with_texts(split: SplitTexts, places: Sequence[int]) -> SplitTexts:
    new = torch.full((len(split.texts),), -1, dtype=torch.int64)
    new[list(places)] = torch.arange(len(places))
    text = new[split.positives[:, 1]]
    return SplitTexts(
        split.image_ids,
        [split.text_ids[place] for place in places],
        [split.texts[place] for place in places],
        [split.languages[place] for place in places],
        torch.stack([split.positives[:, 0], text], 1)[text >= 0],
    )


def _classified(
    held: Held, languages: Sequence[str], opened: Opened, options: Options, encoder: SharedEncoder
) -> dict[str, Entry]:
    """Top-1 and top-5 with the words of every language; the pictures are encoded once, by all processes."""
    source: Source = held.source
    kept = [place for place, label in enumerate(held.labels[languages[0]]) if label is not None]  # those in a folder
    pixels = encoder.images(held.about.name, [source.split.image_ids[place] for place in kept], source.read)
    entries: dict[str, Entry] = {}

    def score() -> None:
        with evaluating(opened.model, dtype=opened.dtype):
            for language in languages:
                classes, sentences = held.classes[language], _sentences(held, language, opened)
                words = class_features(opened.model, classes, sentences, batch_size=2 * opened.batch_size)
                truth = torch.tensor([held.labels[language][place] for place in kept], dtype=torch.int64)
                parts = zip(pixels.split(4096), truth.split(4096), strict=True)
                rank = torch.cat([class_ranks((part @ words.T).double(), own) for part, own in parts])
                ks = (1, 5) if len(classes) > 5 else (1,)  # of five classes, the five best say nothing
                hits = torch.stack([(rank <= k).double() for k in ks], 1)
                scores = intervals(
                    HitTable(hits, torch.ones_like(hits), [f"top-{k}" for k in ks]),
                    None,
                    draws=DRAWS,
                    confidence=CONFIDENCE,
                )
                entries[language] = _entry(held, language, scores) | {
                    "images": len(kept),
                    "classes": len(classes),
                    "templates": sentences,
                }

    on_first(score, opened.model.device)
    return entries


def _sentences(held: Held, language: str, opened: Opened) -> list[str]:
    """The user's templates, else those of the language; of a family that has its own, those of them in the language."""
    if language in held.templates:
        return read_templates(str(held.templates[language]))
    of_family = family_of(opened.model.text_tower).templates
    if of_family in ("zh", "en"):
        return read_templates(language)
    return [line for line in read_templates(of_family) if (detect_language(line) == "en") == (language == "en")]


def _entry(held: Held, language: str, scores: Sequence[Interval]) -> Entry:
    return {
        "dataset": held.about.name,
        "language": language,
        "path": str(held.source.path),
        "checksum": held.source.checksum,
        "scores": {
            one.measure: {key: value for key, value in asdict(one).items() if key != "measure"} for one in scores
        },
        "found": held.notes,
    }


def _beside(about: BenchmarkSet, entry: Entry, size: str | None) -> Entry:
    """Published results where the pool is theirs, and what is to be said of the set."""
    what, count = ("classes" if about.classes else "texts"), entry["classes" if about.classes else "texts"]
    notes = [about.protocol, *entry["found"]]
    rows: list[dict[str, Any]] = []
    if entry["images"] == about.images and count in about.texts:
        rows = (
            [asdict(one) for one in published.accuracies(entry["language"])]
            if about.classes
            else [row.as_dict() for row in published.all_rows(about.name, entry["language"], size)]
        )
        if about.classes:
            notes.append(
                f"{len(entry['templates'])} templates a class; published figures are with other class names and templates"
            )
    else:
        notes.append(
            f"this pool has {entry['images']:,} pictures and {count:,} {what} instead of {about.images:,} and "
            f"{' or '.join(f'{n:,}' for n in about.texts)}: no published result is shown beside it"
        )
    return {"published": rows, "notes": notes}


def benchmark_tables(report: Mapping[str, Any], *, markdown: bool = False, width: int | None = None) -> str:
    """Recalls, then accuracies; published results below each set; then the notes and what is missing."""
    sources: dict[str, str] = {}
    recalls: list[list[str]] = []
    accuracies: list[list[str]] = []
    notes: list[str] = []
    for entry in report[KIND]:
        name = f"{entry['dataset']} · {entry['language']}"
        names, rows = (_RECALLS, recalls) if "classes" not in entry else (["top-1", "top-5"], accuracies)
        found = [entry["scores"].get(one) for one in names]
        rows.append([name, *(number(one and one["value"]) for one in found)])
        rows.append(["  95 %", *(f"{one['low']:.1f}–{one['high']:.1f}" if one else "–" for one in found)])
        for row in entry["published"]:
            mark = sources.setdefault(row["source"], f"[{len(sources) + 1}]")
            rows.append([f"  {row['model']} {row['size']}{_setting(row)} {mark}", *_published_cells(row)])
        notes += [f"{name}: {note}" for note in entry["notes"]]
    blocks: list[str] = []
    for heads, rows in ((benchmark_recall_heads(), recalls), (_ACCURACY_HEADS, accuracies)):
        if markdown and (rows or not blocks):  # its first line tells whose file it is
            blocks.append(markdown_table(heads, rows))
        elif rows:
            blocks.append(table(heads, rows, width=width))
    bullet = "* " if markdown else "note: "
    lines = [f"{bullet}{note}" for note in provenance.image_size_notes(report.get("settings")) + notes]
    lines.append(
        f"{bullet}95 %: bootstrap over pictures, {report['draws']:,} draws; indented names are published results, not measured here"
    )
    lines += [f"{bullet}{mark} {source}" for source, mark in sources.items()]
    lines += [f"{bullet}not there: {one}" for one in report["missing"]]
    text = "\n".join(lines)
    return "\n\n".join([*blocks, text if markdown else fitted(text, width)])


def _setting(row: Mapping[str, Any]) -> str:
    return " fine-tuned" if row.get("setting") == "fine-tuned" else ""


def _published_cells(row: Mapping[str, Any]) -> list[str]:
    if "top1" in row:
        return [number(row["top1"]), "–"]
    ways = [row[way] or {} for way in ("text_to_image", "image_to_text")]
    return [*(number(way.get(f"r{k}")) for way in ways for k in KS), number(row["mean_recall"])]
