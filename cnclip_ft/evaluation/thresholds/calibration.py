"""What score means "match": a threshold on the cosine for a wanted precision or recall, from labelled pairs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnclip_ft.evaluation.options import Opened
from cnclip_ft.evaluation.results import provenance
from cnclip_ft.features.encode import SplitFeatures, encode_images, encode_texts, evaluating
from cnclip_ft.features.folder import read_info, read_split
from cnclip_ft.features.sources import FolderReader, store_source
from data_tools.errors import DataFault, RequestError
from data_tools.shards import is_pairs


@dataclass
class LabelledPair:
    """An image (an id or a path), a text, and whether they belong together."""

    image: str
    text: str
    match: bool


_YES, _NO = {"1", "true", "yes", "y"}, {"0", "false", "no", "n"}


def read_pairs(path: str | Path) -> list[LabelledPair]:
    """``.jsonl`` lines ``{"image", "text", "match": true}``, or ``.csv``/``.tsv`` with these three columns.

    Raises:
        RequestError: not readable, or without both kinds of pairs.
        DataFault: a line lacks a field, or `match` is neither yes nor no.
    """
    path = Path(path)
    pairs: list[LabelledPair] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                rows = [(n, _json(path, n, line)) for n, line in enumerate(file, 1) if line.strip()]
            else:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read ({error})") from None
    for number, row in rows:
        missing = [key for key in ("image", "text", "match") if row.get(key) is None]
        if missing:
            raise DataFault(
                f"no {' and no '.join(missing)}",
                mend="Give image, text and match (1 or 0) for every pair.",
                kind="missing-field",
                file=path,
                line=number,
            )
        said = str(row["match"]).strip().lower()
        if said not in _YES | _NO:
            raise DataFault(
                f"match is {row['match']!r}",
                mend="Write 1 for a match and 0 for none.",
                kind="bad-label",
                file=path,
                line=number,
            )
        pairs.append(LabelledPair(str(row["image"]), str(row["text"]), said in _YES))
    matches = sum(pair.match for pair in pairs)
    if not 0 < matches < len(pairs):
        raise RequestError(f"{path} has {matches} matching and {len(pairs) - matches} other pairs; both are needed")
    return pairs


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise DataFault(
        "the line is not a JSON object",
        mend='Write {"image": …, "text": …, "match": 1} on each line.',
        kind="bad-json",
        file=path,
        line=number,
    )


def pair_scores(opened: Opened, pairs: Sequence[LabelledPair], images: Path) -> torch.Tensor:
    """float64 cosine of every labelled pair; each image and each text is encoded once.

    Raises:
        DataFault: an image of the pairs is not in `images`, a folder or a store.
    """
    read: Callable[[Any], Any] = FolderReader(images)
    if is_pairs(images):
        source = store_source(images)
        read, there = source.read, {str(image_id): image_id for image_id in source.split.image_ids}
    else:
        there = {pair.image: pair.image for pair in pairs if (images / pair.image).is_file()}
    missing = next((pair.image for pair in pairs if pair.image not in there), None)
    if missing is not None:
        raise DataFault(
            f"image {missing!r} is not in {images}",
            mend="Say where the images lie with --images.",
            kind="missing-image",
            file=images,
        )
    image_at = {name: number for number, name in enumerate(dict.fromkeys(pair.image for pair in pairs))}
    text_at = {text: number for number, text in enumerate(dict.fromkeys(pair.text for pair in pairs))}
    model, size = opened.model, opened.batch_size
    with evaluating(model, dtype=opened.dtype):
        ids = [there[name] for name in image_at]
        pictures = encode_images(model, ids, read, batch_size=size, workers=opened.workers)
        words = encode_texts(model, list(text_at), batch_size=2 * size)
    left = torch.tensor([image_at[pair.image] for pair in pairs])
    right = torch.tensor([text_at[pair.text] for pair in pairs])
    return (pictures[left].double() * words[right].double()).sum(1)


def features_of(opened: Opened, folder: str) -> SplitFeatures:
    """What `encode` wrote.

    Raises:
        RequestError: it was made with another model, or of pictures of another size.
    """
    features, settings = read_split(folder), read_info(folder)["settings"]
    made_by, side = settings["checkpoint"], settings["settings"]["image_transform"]["size"]
    own = provenance.describe_checkpoint(opened.model, opened.checkpoint)
    if provenance.weights_sum(made_by) != provenance.weights_sum(own):
        raise RequestError(
            f"the features in {folder} were made with {made_by.get('path')}, another model than {opened.checkpoint}"
        )
    if side != opened.model.image_size:
        raise RequestError(
            f"the features in {folder} are of pictures of {side} × {side}, not {opened.model.image_size} × {opened.model.image_size}: "
            f"--image-size {side}"
        )
    return features


def sampled_scores(
    features: SplitFeatures, negatives: int, seed: int, prepare: Callable[[str], str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of a split's own pairs and of `negatives` random other images for each.

    A drawn image is no negative when it belongs to the text, or to one that is the same to the model (`Tokenizer.prepare`).

    Returns:
        float64 scores and bool labels, both ``[pairs + negatives drawn]``.

    Raises:
        RequestError: the split has no pairs, or fewer than two images.
    """
    pairs = features.positives
    count = len(features.image_ids)
    if not len(pairs) or count < 2:
        raise RequestError(
            f"the split has {len(pairs)} pairs and {count} images; a threshold needs pairs and other images"
        )
    same: dict[str, int] = {}
    meaning = torch.tensor([same.setdefault(prepare(text), len(same)) for text in features.texts])
    own = (meaning[pairs[:, 1]] * count + pairs[:, 0]).unique()
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(count, (len(pairs) * negatives,), generator=generator)
    text = pairs[:, 1].repeat_interleave(negatives)
    other = ~torch.isin(meaning[text] * count + image, own)
    image, text = image[other], text[other]
    if not len(image):
        raise RequestError(
            "every text belongs to every image of the split, so there are no other pairs to compare with"
        )
    index = torch.cat([pairs, torch.stack([image, text], 1)])
    labels = torch.zeros(len(index), dtype=torch.bool)
    labels[: len(pairs)] = True
    return cosines(features, index), labels


def cosines(features: SplitFeatures, pairs: torch.Tensor) -> torch.Tensor:
    """float64 ``[pairs]`` of rows (image, text), int64 ``[pairs, 2]``."""
    parts = [
        (features.image_features[part[:, 0]].double() * features.text_features[part[:, 1]].double()).sum(1)
        for part in pairs.split(65536)
    ]
    return torch.cat(parts)


@dataclass
class Curve:
    """Precision and recall when everything at or above a threshold counts as a match; thresholds descending."""

    thresholds: torch.Tensor
    precision: torch.Tensor
    recall: torch.Tensor
    matched: torch.Tensor  # true matches at or above
    others: torch.Tensor  # false ones

    @property
    def average_precision(self) -> float:
        steps = torch.diff(self.recall, prepend=torch.zeros(1, dtype=self.recall.dtype))
        return float((steps * self.precision).sum())

    def some(self, count: int) -> dict[str, list[float]]:
        """About `count` points, evenly spread over them all."""
        step = max(1, len(self.thresholds) // count)
        return {name: getattr(self, name)[::step].tolist() for name in ("thresholds", "precision", "recall")}


def curve(scores: torch.Tensor, labels: torch.Tensor, share: float | None = None) -> Curve:
    """The whole curve, one point a distinct score.

    Args:
        share: part of the pairs to be judged later that will match; None: as in these. Precision depends on it,
            recall does not.
    """
    order = scores.argsort(descending=True)
    ordered, right = scores[order], labels[order].double()
    last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])  # equal scores stand or fall together
    matched, others = right.cumsum(0)[last], (1 - right).cumsum(0)[last]
    total, rest = matched[-1], others[-1]
    weight = 1.0 if share is None else float(total / rest * (1 - share) / share)
    return Curve(ordered[last], matched / (matched + weight * others), matched / total, matched, others)


@dataclass
class Threshold:
    """The chosen point; intervals hold 95 % of what chance alone would do to a sample of this size (Wilson)."""

    cosine: float
    precision: float
    precision_interval: tuple[float, float] | None  # None when the share was given: no plain proportion then
    recall: float
    recall_interval: tuple[float, float]
    wanted: str


def check_wishes(precision: float | None, recall: float | None, share: float | None) -> None:
    """Raises:
    RequestError: not exactly one wish, or a share out of (0, 1).
    """
    if (precision is None) == (recall is None):
        raise RequestError("say either --precision or --recall, e.g. --precision 0.95")
    if share is not None and not 0 < share < 1:
        raise RequestError(f"--share is {share}; it lies between 0 and 1, e.g. 0.01 when one pair in a hundred matches")


def choose(
    points: Curve, *, precision: float | None = None, recall: float | None = None, share: float | None = None
) -> Threshold:
    """Lowest threshold that has the precision (most matches found), or highest that has the recall (fewest mistakes).

    Raises:
        RequestError: not exactly one wish, out of (0, 1], or a precision that no threshold reaches.
    """
    check_wishes(precision, recall, share)
    wish = precision if recall is None else recall
    if wish is None or not 0 < wish <= 1:
        raise RequestError(f"a precision or recall of {wish} was asked for; it lies between 0 and 1")
    if recall is not None:
        at = int((points.recall >= recall - 1e-12).nonzero()[0, 0])
    else:
        reached = (points.precision >= wish - 1e-12).nonzero()[:, 0]
        if not len(reached):
            best = int(points.precision.argmax())
            raise RequestError(
                f"no threshold reaches precision {precision}: the best is {points.precision[best]:.3f} at cosine "
                f"{points.thresholds[best]:.4f}. Ask for less, or fine-tune the model on data like these"
            )
        at = int(reached[-1])
    hits, wrong = int(points.matched[at]), int(points.others[at])
    return Threshold(
        cosine=float(points.thresholds[at]),
        precision=float(points.precision[at]),
        precision_interval=wilson(hits, hits + wrong) if share is None else None,
        recall=float(points.recall[at]),
        recall_interval=wilson(hits, int(points.matched[-1])),
        wanted=f"precision {precision}" if recall is None else f"recall {recall}",
    )


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion; sensible also at 0 and 1."""
    share, square = hits / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def in_numbers(found: Threshold, points: Curve, *, drawn: bool) -> str:
    """Two lines: what was judged (others `drawn` at random?), and the threshold with its intervals."""
    others, interval = " other pairs drawn at random" if drawn else " other pairs", found.precision_interval
    said = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return (
        f"{int(points.matched[-1]):,} matching and {int(points.others[-1]):,}{others}; "
        f"average precision {points.average_precision:.3f}\n"
        f"for {found.wanted}: cosine >= {found.cosine:.4f}   precision {found.precision:.3f}{said}   "
        f"recall {found.recall:.3f} ({found.recall_interval[0]:.3f} to {found.recall_interval[1]:.3f})"
    )


def in_words(found: Threshold, scores: torch.Tensor, labels: torch.Tensor, temperature: float) -> str:
    """What the three numbers of a CLIP model mean, with this model's own values."""
    yes, no = scores[labels], scores[~labels]
    quarters = np.quantile(yes.numpy(), [0.25, 0.75])  # torch.quantile refuses more than 16 million values
    return "\n".join(
        [
            f"cosine     how alike an image and a text are to this model. Here matching pairs have {yes.mean():.3f} on average "
            f"(middle half {quarters[0]:.3f} to {quarters[1]:.3f}), others {no.mean():.3f}.",
            "           It is no percentage: which value is high differs from model to model. Never carry a threshold over.",
            f"softmax    turns cosines (times {temperature:.1f}) into shares among the candidates you offer. The best candidate can",
            '           get 0.99 although nothing fits, and 0.3 although several fit. It ranks; it does not say "match".',
            f"threshold  call it a match from cosine {found.cosine:.4f} upwards: {100 * found.precision:.1f} % of what you accept then is",
            f"           right, and {100 * found.recall:.1f} % of the true matches are found – for pairs like these.",
        ]
    )
