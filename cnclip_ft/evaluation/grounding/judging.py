"""`evaluate --grounding`: how well a checkpoint finds the phrases of stores whose pairs have boxes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cnclip_ft.evaluation.options import Opened, Options, open_model
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.evaluation.results.recall_table import markdown_table, number
from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.grounding.finder import LEARNT, MOST_PROPOSED, How, decode, find
from cnclip_ft.grounding.heat import Box
from cnclip_ft.grounding.metrics import KS, GroundingScores, Judged, judge, scores
from data_tools import tables
from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError
from data_tools.language import detect_language
from data_tools.shards import open_pairs
from data_tools.store import Id, PairSource

SMALL = 1 / 16  # of the picture's area: a phrase all of whose boxes together are smaller is called small
PROTOCOLS = {
    "any_box": "any-box recall at IoU 0.5: one of the k best boxes meets any of the phrase's boxes",
    "merged_box": "merged-box recall at IoU 0.5: one of the k best boxes meets the one box around all of the phrase's; of learnt boxes the first "
    "is what encloses those with at least half of the best probability",
    "accuracy": "RefCOCO accuracy at IoU 0.5: the best box meets the phrase's only box; phrases with several are left out",
    "pointing": "pointing game: the hottest place, or the middle of the best learnt box, lies in one of the phrase's boxes",
}


@dataclass(frozen=True)
class Phrase:
    """What a store says: these boxes of a picture show it."""

    text: str
    boxes: list[Box]
    language: str | None

    @property
    def kinds(self) -> list[str]:
        """What groups it is counted in."""
        area = sum(width * height for _, _, width, height in self.boxes)
        return [
            *([self.language] if self.language else []),
            "one box" if len(self.boxes) == 1 else "several boxes",
            "small" if area < SMALL else "not small",
        ]


@dataclass
class GroundingCard:
    """Scores by split and group (``all``, languages, kinds), and the record that goes into the JSON."""

    scores: dict[str, dict[str, GroundingScores]]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def table(self, *, markdown: bool = False, width: int | None = None) -> str:
        """A table a protocol, each headed by its name."""
        parts = []
        for name, heads, cells in _TABLES:
            rows = []
            for split, groups in self.scores.items():
                for group, found in groups.items():
                    values = cells(found)
                    if values is not None:
                        rows.append([split if group == "all" else f"  {split} · {group}", *values])
            if not rows:
                continue
            body = markdown_table(heads, rows) if markdown else tables.table(heads, rows, width=width)
            parts.append(f"{tables.fitted(PROTOCOLS[name], width)}\n\n{body}")
        parts += [tables.fitted(f"note: {note}", width) for note in self.notes]
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return self.record


def _recall_cells(by_k: dict[int, float], bound: float, phrases: int) -> list[str]:
    return [*(number(by_k[k]) for k in KS), number(bound), f"{phrases:,}"]


_RECALL = ["", *(f"R@{k}" for k in KS), "upper bound", "phrases"]
_TABLES = (
    ("any_box", _RECALL, lambda s: _recall_cells(s.any_box, s.any_bound, s.phrases)),
    ("merged_box", _RECALL, lambda s: _recall_cells(s.merged_box, s.merged_bound, s.phrases)),
    (
        "accuracy",
        ["", "accuracy", "phrases"],
        lambda s: None if s.accuracy is None else [number(s.accuracy), f"{s.singles:,}"],
    ),
    (
        "pointing",
        ["", "pointing", "chance", "centre", "phrases"],
        lambda s: [number(s.pointing), number(s.chance), number(s.centre), f"{s.phrases:,}"],
    ),
)


def phrases_with_boxes(store: PairSource) -> tuple[dict[Id, list[Phrase]], int]:
    """By picture, in the store's order; and how many pairs have no boxes.

    Raises:
        RequestError: no pair has any.
    """
    found: dict[Id, list[Phrase]] = defaultdict(list)
    without = 0
    for pair, beside in store.pairs_and_beside():
        if "boxes" in beside:
            boxes: list[Box] = [(x, y, width, height) for x, y, width, height in beside["boxes"]]
            found[pair.image_id].append(Phrase(pair.text, boxes, pair.language or detect_language(pair.text)))
        else:
            without += 1
    if not found:
        raise RequestError(
            f"{store.path}: none of its {len(store):,} pairs has boxes, so nothing says where its phrases are; "
            "docs/grounding.md#boxes-in-a-store says how a store gets them"
        )
    return dict(found), without


def score_grounding(
    checkpoint: str | Path,
    splits: Sequence[str | Path],
    options: Options,
    method: str | None = None,
    threshold: float | None = None,
) -> GroundingCard:
    """Find every phrase that has boxes, and hold what is found against them.

    Raises:
        RequestError: checkpoint, split or option cannot be used, or no pair of a split has boxes.
        DataFault: an image or a pair is broken.
    """
    options.check()
    if not splits:
        raise RequestError("name at least one split (a store whose pairs have boxes) to evaluate on")
    how = How(method, most=MOST_PROPOSED) if threshold is None else How(method, threshold, MOST_PROPOSED)
    stores = [open_pairs(split) for split in splits]
    known = [phrases_with_boxes(store) for store in stores]
    opened = open_model(checkpoint, options)
    chosen = how.method_of(opened.model)
    if chosen == LEARNT and threshold is None:
        how = replace(how, threshold=0.0)  # every box counts, in its order
    about = opened.described()
    record = {
        "format": provenance.FORMAT,
        **about,
        "versions": provenance.versions(),
        "method": chosen,
        "threshold": how.threshold,
        "protocols": PROTOCOLS,
        "splits": {},
    }
    notes = [f"method {chosen}, threshold {how.threshold:g}", *provenance.image_size_notes(about["settings"])]
    card = GroundingCard({}, record, notes)
    for store, (by_picture, without) in zip(stores, known, strict=True):
        groups: dict[str, list[Judged]] = {"all": []}
        for phrase, judged in _judged(opened, store, by_picture, how):
            for kind in ("all", *phrase.kinds):
                groups.setdefault(kind, []).append(judged)
        found = {name: scores(groups[name]) for name in ("all", *sorted(groups.keys() - {"all"}))}
        name = next(one for one in _names(store.name) if one not in card.scores)
        card.scores[name] = found
        if without:
            card.notes.append(f"{name}: {without:,} pairs without boxes are left out")
        record["splits"][name] = {
            "path": str(store.path),
            "checksum": store.checksum(),
            "pictures": len(by_picture),
            "without_boxes": without,
            "scores": {group: asdict(one) for group, one in found.items()},
        }
    return card


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name} ({number})" for number in range(2, 10_000))


def _judged(
    opened: Opened, store: PairSource, by_picture: dict[Id, list[Phrase]], how: How
) -> Iterator[tuple[Phrase, Judged]]:
    model = opened.model
    ids, size = list(by_picture), max(1, opened.batch_size // 8)  # maps of a batch are held
    with evaluating(model, dtype=opened.dtype):
        texts = list(dict.fromkeys(phrase.text for phrases in by_picture.values() for phrase in phrases))
        places = {text: place for place, text in enumerate(texts)}
        features = encode_texts(model, texts, batch_size=2 * opened.batch_size)
        for start in Bar(range(0, len(ids), size), desc="grounding", unit="batch"):
            some = ids[start : start + size]
            pictures = []
            for image_id in some:
                try:
                    pictures.append(decode(model, store.image(image_id)))
                except KeyError:
                    raise RequestError(f"{store.path} names image {image_id!r}, which it does not hold") from None
                except DataFault as fault:
                    raise DataFault(
                        f"image {image_id!r}: {fault.problem}", mend=fault.mend, kind=fault.kind, file=store.path
                    ) from None
            phrases = [by_picture[image_id] for image_id in some]
            asked = [[phrase.text for phrase in own] for own in phrases]
            given = [features[[places[text] for text in own]] for own in asked]
            for own, found in zip(phrases, find(model, pictures, asked, given, how), strict=True):
                for phrase, one in zip(own, found, strict=True):
                    yield phrase, judge(one.boxes, one.hottest, phrase.boxes, one.heat.part, one.merged)
