"""What a split looks like, and what in it would hurt training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data_tools.annotations import detect_language
from data_tools.errors import DataFault
from data_tools.pictures import check_picture
from data_tools.store import PairStore

BATCHES = (128, 1024, 8192)
_SHOWN = 5


@dataclass
class CheckReport:
    """`facts`: name → value, in the order to show; `harms`: what would hurt training; `notes`: worth knowing."""

    facts: dict[str, Any] = field(default_factory=dict)
    harms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "harms": self.harms, "notes": self.notes}


def check_store(
    store: PairStore,
    *,
    others: Sequence[PairStore] = (),
    token_lengths: Callable[[Sequence[str]], list[int]] | None = None,
    context_length: int = 52,
    progress: bool = True,
) -> CheckReport:
    """Read a whole split once.

    Args:
        others: further splits, searched for the same images or texts (leakage).
        token_lengths: tokens per text, uncut, for the share that is cut at `context_length`.
    """
    report = CheckReport()
    hashes = _check_images(store, report, progress)
    texts, used = _check_pairs(store, report)
    if token_lengths is not None and texts:
        lengths = sorted(token_lengths(texts))
        cut = sum(length > context_length for length in lengths)
        report.facts["caption tokens"] = f"{sum(lengths) / len(lengths):.1f} mean, {lengths[len(lengths) // 2]} median, {lengths[-1]} longest"
        report.facts[f"cut at {context_length} tokens"] = f"{cut:,} ({100 * cut / len(lengths):.1f}%)"
        if cut > 0.05 * len(lengths):
            report.notes.append(f"{100 * cut / len(lengths):.0f}% of the captions lose their end; raise data.context_length")
    unused = [image_id for image_id in store.image_ids if image_id not in used]
    if unused:
        report.notes.append(f"{len(unused):,} images have no text, e.g. {unused[0]!r}")
    for other in others:
        _check_leakage(store, other, hashes, set(texts), report)
    return report


def _check_images(store: PairStore, report: CheckReport, progress: bool) -> dict[str, int | str]:
    """Content hash → first image id; formats, sizes and faults into the report."""
    kinds: Counter[str] = Counter()
    sides: list[int] = []
    first: dict[str, int | str] = {}
    repeated, faults = [], []
    for image_id in tqdm(store.image_ids, desc="checking images", unit="image", disable=None if progress else True):
        data = store.image(image_id)
        digest = hashlib.sha256(data).hexdigest()
        if digest in first:
            repeated.append((image_id, first[digest]))
        first.setdefault(digest, image_id)
        try:
            header = check_picture(data, decode=True)
            kinds[header.kind] += 1
            sides.append(min(header.width, header.height))
        except DataFault as fault:
            faults.append(f"image {image_id!r}: {fault.problem}")
    report.facts["images"] = len(store.image_ids)
    report.facts["formats"] = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()) or "–"
    if sides:
        sides.sort()
        report.facts["shorter side"] = f"{sides[0]} smallest, {sides[len(sides) // 2]} median, {sides[-1]} largest (pixels)"
        small = sum(side < 64 for side in sides)
        if small > 0.1 * len(sides):
            report.notes.append(f"{small:,} images are smaller than 64 pixels")
    report.facts["repeated images"] = len(repeated)
    if repeated:
        a, b = repeated[0]
        report.notes.append(f"{len(repeated):,} images have the content of another (e.g. {a!r} and {b!r}) under an id of their own: "
                            "as pairs they count as each other's negatives")  # fmt: skip
    if faults:
        report.harms.append(f"{len(faults):,} images cannot be decoded: " + "; ".join(faults[:_SHOWN]))
    return first


def _check_pairs(store: PairStore, report: CheckReport) -> tuple[list[str], set[int | str]]:
    per_image: Counter[int | str] = Counter()
    per_text: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    missing = []
    known = set(store.image_ids)
    for pair in store.pairs():
        per_image[pair.image_id] += 1
        per_text[pair.text] += 1
        languages[pair.language or detect_language(pair.text) or "other"] += 1
        if pair.image_id not in known:
            missing.append(pair)
    n = len(store)
    report.facts |= {
        "pairs": n,
        "distinct texts": len(per_text),
        "texts without image": len(store.lone_texts),
        "pairs per image": f"{n / max(len(per_image), 1):.2f} mean, {max(per_image.values(), default=0)} most",
        "languages": ", ".join(f"{name} {count:,}" for name, count in languages.most_common()) or "–",
    }
    repeated = {text: count for text, count in per_text.items() if count > 1}
    report.facts["repeated texts"] = len(repeated)
    if n:
        # Chance that another pair of the batch is not a true negative: same image or same text, by id alone.
        same = sum(count * (count - 1) for counts in (per_image, per_text) for count in counts.values()) / n
        for batch in BATCHES:
            expected = same * (min(batch, n) - 1) / max(n - 1, 1)
            report.facts[f"false negatives at batch {batch:,}"] = f"{expected:.3f} expected per pair, left out of the loss by id"
        text, count = per_text.most_common(1)[0]
        if count > max(0.2 * n, 1) and len(per_image) > 1:
            report.harms.append(f"the text {text[:30]!r} stands on {100 * count / n:.0f}% of the pairs: there is little to learn from it")
    elif not store.lone_texts:
        report.harms.append("the split has no pairs")
    if missing:
        pair = missing[0]
        report.harms.append(f"{len(missing):,} pairs name an image that is not there (e.g. text {pair.text_id!r}, image {pair.image_id!r})")
    return list(per_text), set(per_image)


def _check_leakage(store: PairStore, other: PairStore, hashes: dict[str, Any], texts: set[str], report: CheckReport) -> None:
    shared = [i for i in other.image_ids if hashlib.sha256(other.image(i)).hexdigest() in hashes]
    same_texts = {pair.text for pair in other.pairs()} & texts
    report.facts[f"shared with {other.name}"] = f"{len(shared):,} images, {len(same_texts):,} texts"
    if shared:
        report.harms.append(f"{len(shared):,} images of {other.path} are in this split too (e.g. {shared[0]!r}): recall there would be too good")
    if same_texts:
        report.notes.append(f"{len(same_texts):,} texts of {other.path} are in this split too, e.g. {sorted(same_texts)[0][:30]!r}")
