"""`cnclip-ft evaluate`: scores of a checkpoint, a feature folder or a prediction file, with everything they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.data.official_layout import judged_splits
from cnclip_ft.evaluation.options import Opened, Options, open_model
from cnclip_ft.evaluation.results import provenance, published
from cnclip_ft.evaluation.results.recall_table import recall_table
from cnclip_ft.evaluation.scores.official_results import refuse_official, write_official
from cnclip_ft.evaluation.scores.twins import Twin, TwinScores, find_twins, score_twins, twin_table
from cnclip_ft.features import official_files
from cnclip_ft.features.encode import SplitFeatures, SplitTexts
from cnclip_ft.features.folder import read_info, read_split
from cnclip_ft.features.sources import Source, store_source
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.retrieval.recall import RetrievalScores, recall
from cnclip_ft.runtime import parse_device
from data_tools.columns import refuse_unknown
from data_tools.errors import RequestError
from data_tools.language import main_language
from data_tools.shards import open_pairs
from data_tools.tables import fitted


@dataclass
class Scorecard:
    """Scores by split name, published rows beside them, and the record that goes into the JSON."""

    scores: dict[str, RetrievalScores]
    record: dict[str, Any]
    published: list[published.PublishedRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    twins: dict[str, TwinScores] = field(default_factory=dict)

    def table(self, *, markdown: bool = False, width: int | None = None) -> str:
        text = recall_table(self.scores, extra=[row.cells() for row in self.published], markdown=markdown, width=width)
        if self.twins:
            text += "\n\n" + twin_table(self.twins, markdown=markdown, width=width)
        mark = "* " if markdown else "note: "
        notes = fitted("\n".join(mark + note for note in self.notes), width)
        return f"{text}\n\n{notes}" if notes else text

    def as_dict(self) -> dict[str, Any]:
        return self.record


def score_checkpoint(
    checkpoint: str | Path,
    splits: Sequence[str | Path],
    options: Options,
    by: str | None = None,
    official: Path | None = None,
    swapped: bool = False,
) -> Scorecard:
    """Encode every split and score it both ways.

    Args:
        splits: stores, or the folders of data sets, of which valid and test are judged.
        by: a column the stores keep (a category): its values are scored one by one as well.
        official: a folder for the result files of the official scripts (`official_results`).
        swapped: ask too whether captions are told from themselves with one attribute swapped (`twins`).

    Raises:
        RequestError: checkpoint, split or option cannot be used; nothing has been encoded.
        DataFault: an image or a pair is broken.
    """
    options.check()
    if not splits:
        raise RequestError("name at least one split (a store, e.g. DATA/valid) to evaluate on")
    splits = [store for place in splits for store in judged_splits(place)]
    if official is not None:
        refuse_official(official, splits, checkpoint)
    sources = [store_source(split) for split in splits]
    groups = [_groups(source, by) if by else [] for source in sources]
    opened = open_model(checkpoint, options)
    described = opened.described()
    card = _card({**described, "settings": described["settings"] | {"batch_size": options.batch_size}})
    for source, labels in zip(sources, groups, strict=True):
        features = opened.features(source)
        if official is not None:
            write_official(official, source.path, features, memory=options.memory, device=opened.device)
        scores = recall(features, memory=options.memory, device=opened.device, groups=labels)
        about = {
            "path": str(source.path),
            "checksum": source.checksum,
            "truncated_texts": _truncated(opened.model, source.split),
        }
        size = provenance.size_name(opened.model)
        name = _unique(card, source.name)
        _add(card, name, features, scores, about, size, source.path, options)
        if swapped:
            _add_twins(card, name, features, opened)
    return card


def _add_twins(card: Scorecard, name: str, features: SplitFeatures, opened: Opened) -> None:
    twins = find_twins(features)
    if not twins:
        card.notes.append(
            f"{name}: no caption has an attribute to swap (colour, number, position, object) for one that another caption has"
        )
        return
    found = score_twins(features, _features_of(twins, features, opened), twins)
    card.twins[name] = found
    card.record["splits"][name]["swapped"] = found.as_dict()


def _features_of(twins: Sequence[Twin], features: SplitFeatures, opened: Opened) -> torch.Tensor:
    """Those of the sentences. One that the model reads as the caption itself, as it cuts both before they differ, has the caption's:
    encoded in another batch it would differ by rounding, and be right by chance."""
    encode, sentences = opened.model.tokenizer.encode, [twin.swapped for twin in twins]
    found, own = opened.text_features(sentences), [twin.text for twin in twins]
    pairs = zip(encode(sentences), encode([features.texts[text] for text in own]), strict=True)
    alike = torch.tensor([one == other for one, other in pairs])
    return torch.where(alike[:, None], features.text_features[own], found)


def score_features(folder: str | Path, options: Options) -> Scorecard:
    """Score a folder that `cnclip-ft encode` wrote from a store."""
    options.check()
    info = read_info(folder)
    features = read_split(folder)
    scores = recall(features, memory=options.memory, device=parse_device(options.device))
    settings = info["settings"]
    card = _card(
        {"checkpoint": settings.get("checkpoint"), "settings": settings.get("settings"), "features": str(folder)}
    )
    source = settings.get("source", {})
    size = (settings.get("checkpoint") or {}).get("architecture")
    _add(
        card,
        source.get("name") or Path(folder).name,
        features,
        scores,
        source,
        size,
        Path(source.get("path", folder)),
        options,
    )
    return card


def score_predictions(predictions: str | Path, answers: Sequence[str | Path]) -> tuple[str, dict[str, Any]]:
    """Score an official prediction file against official answers: a line to print, and the official score file.

    Text→image answers serve image→text predictions too: they are turned around.

    Raises:
        RequestError: not exactly one answers file, or it does not fit the predictions.
        DataFault: a broken line.
    """
    if len(answers) != 1:
        raise RequestError("a prediction file is scored against one answers file: PREDICTIONS.jsonl TEXTS.jsonl")
    if Path(answers[0]).is_dir():
        raise RequestError(
            f"{answers[0]} is a folder; a prediction file is scored against answers (…_texts.jsonl or ….tr.jsonl)"
        )
    predicted, right = official_files.read_predictions(predictions), official_files.read_answers(answers[0])
    if predicted.query_kind != right.query_kind:
        right = official_files.turn_answers(right)
    scores = official_files.score_predictions(predicted, right)
    arrow = "text→image" if predicted.query_kind == "text" else "image→text"
    line = (
        f"{arrow}: R@1 {scores['r1']:.2f}  R@5 {scores['r5']:.2f}  R@10 {scores['r10']:.2f}  "
        f"mean recall {scores['mean_recall']:.2f}  ({scores['queries']:,} queries)"
    )
    if scores["without_answer"]:
        line += f"\nnote: queries without a known answer, left out: {scores['without_answer']:,}"
    return line, official_files.score_file(scores)


def _card(head: dict[str, Any]) -> Scorecard:
    record = {"format": provenance.FORMAT, **head, "versions": provenance.versions(), "splits": {}}
    return Scorecard({}, record, notes=provenance.image_size_notes(head.get("settings")))


def _unique(card: Scorecard, name: str) -> str:
    if name not in card.scores:
        return name
    return next(f"{name} ({n})" for n in range(2, len(card.scores) + 3) if f"{name} ({n})" not in card.scores)


_MOST_GROUPS = 60


def _groups(source: Source, column: str) -> list[str]:
    """For every text what its first picture has in `column`.

    Raises:
        RequestError: the store keeps no such column, or too many values in it.
    """
    store = open_pairs(source.path)
    refuse_unknown([column], store.columns, source.path)
    labels = ["–"] * len(source.split.texts)
    for image, text in reversed(source.split.positives.tolist()):
        labels[text] = str(store.columns_of(source.split.image_ids[image]).get(column, "–"))
    if len(set(labels)) > _MOST_GROUPS:
        raise RequestError(
            f"--by {column}: {len(set(labels)):,} values are too many for a table; name a column like a category"
        )
    return labels


def _truncated(model: DualEncoder, split: SplitTexts) -> int:
    return sum(length > model.context_length for length in model.tokenizer.lengths(split.texts)) if split.texts else 0


def _add(
    card: Scorecard,
    name: str,
    features: SplitFeatures,
    scores: RetrievalScores,
    about: dict[str, Any],
    size: str | None,
    path: Path,
    options: Options,
) -> None:
    card.scores[name] = scores
    entry = about | {
        "images": len(features.image_ids),
        "texts": len(features.text_ids),
        "pairs": len(features.positives),
        "seconds": features.seconds,
        **scores.as_dict(),
    }
    card.notes += [f"{name}: {note}" for note in scores.notes]
    if about.get("truncated_texts"):
        card.notes.append(f"{name}: {about['truncated_texts']:,} texts were cut to the context length")
    dataset = options.dataset or published.recognise(path)
    if dataset not in (None, "none"):
        known = published.rows_for(dataset, size or "")
        language = main_language(features.texts, features.languages)
        warning = published.pool_warning(dataset, len(features.image_ids), len(features.text_ids), language)
        rows = known if options.dataset or not warning else []  # beside another pool only where they are asked for
        entry["published"] = [row.as_dict() for row in rows]
        card.published += [row for row in rows if row not in card.published]
        if known and warning:
            card.notes.append(f"{name}: {warning}" + ("" if rows else f"; --dataset {dataset} shows them"))
            entry["published_note"] = warning
        if not known:
            card.notes.append(
                f"{name}: nothing is published for {published.SPLITS[dataset].title} and the size {size or 'of this model'}"
            )
    card.record["splits"][name] = entry
