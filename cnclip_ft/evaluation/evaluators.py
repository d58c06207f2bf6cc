"""What is judged during training, by name: recall over a whole pool, accuracy on a list of classes, boxes found.

Another one takes a section in `recipe_data.py` (its settings, and in `scores` the names `best_by` may give), one class here,
and its line in `EVALUATORS`. All devices call `Evaluator.judge` together, and the encoder they are given shares the work:
what comes back from it is the same on all of them. Nothing else need be shared or written: journal, tables, report
and checkpoints show what `judge` returns.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cnclip_ft.evaluation.boxes_found import BoxesFound
from cnclip_ft.evaluation.evaluator import Evaluator
from cnclip_ft.evaluation.zero_shot import (
    average_prompts,
    labelled_images,
    prompts,
    read_classes,
    read_templates,
    score_classes,
)
from cnclip_ft.features.encode import SplitFeatures, SplitTexts, read_texts
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.features.sources import open_source
from cnclip_ft.recipe_data import BoxesSplit, ValidStore, ZeroShot
from cnclip_ft.retrieval.recall import RetrievalScores, recall
from data_tools.errors import DataFault, RequestError, UserError
from data_tools.store import PairSource
from data_tools.words import Said, joined

KS = (1, 5, 10)


class Recall(Evaluator):
    """Recall@k both ways over the whole pool of a store, never in-batch accuracy; per language where texts carry one.

    Args:
        language: of texts that do not say theirs.
    """

    def __init__(self, store: PairSource, language: str | None = None) -> None:
        if len(store) == 0:
            raise RequestError(f"data.valid: {store.path} has no pairs, so there is nothing to judge by")
        self.store, self.language = store, language

    @cached_property
    def texts(self) -> SplitTexts:
        texts = read_texts(self.store)
        texts.languages = [language or self.language for language in texts.languages]
        return texts

    def refuse_without(self, wanted: str, key: str) -> None:
        """Refuse where no text says that it is in the language `key` of the recipe asks for (``languages``: Chinese and English)."""
        for language in ("zh", "en") if wanted == "languages" else (wanted,):
            if language not in self.texts.languages:
                known = ", ".join(sorted({each for each in self.texts.languages if each})) or "none"
                raise RequestError(
                    f"{key} asks for {language}, and no text of {self.store.path} says that it is in that language (found: {known}). If its "
                    f"texts are, say so: data.valid={{NAME: {{store: {self.store.path}, language: {language}}}}}; else name another split"
                )

    def judge(self, name: str, encoder: SharedEncoder) -> tuple[RetrievalScores, SplitFeatures]:
        features = encoder.split(name, self.texts, self.store.image)
        return recall(features, ks=KS), features

    def say(self, scores: RetrievalScores) -> list[str]:
        languages = [f"{lang} {part.mean_recall:.2f}" for lang, part in scores.by_language.items() if part.mean_recall]
        return [f"{scores.mean_recall:.2f}", *languages]

    def chance(self) -> dict[str, float | None]:
        """Expected recall of a random order: the mean over queries of the chance that a positive is among the first k."""
        images, texts = self.texts.positives[:, 0], self.texts.positives[:, 1]
        row: dict[str, float] = {}
        for short, queries, gallery in (
            ("t2i", texts, len(self.texts.image_ids)),
            ("i2t", images, len(self.texts.text_ids)),
        ):
            counts = torch.unique(queries, return_counts=True)[1].tolist()
            for k in KS:
                hits = [_hit(gallery, count, min(k, gallery)) for count in counts]
                row[f"{short}_r{k}"] = 100 * sum(hits) / len(counts)
        return {**row, "mean_recall": sum(row.values()) / len(row)}

    def checksum(self) -> str:
        content = self.store.checksum()
        return content if self.language is None else f"{content}-{self.language}"

    def describe(self) -> str:
        counts = Counter(language or "" for language in self.texts.languages)
        told = [
            Said("{name} {count:,}", "{name} {count:,}", name=name or Said("not said", "未注明"), count=count)
            for name, count in counts.most_common()
        ]
        texts = (
            Said("; texts: {told}", "；文本：{told}", told=joined(told, ", ", "，")) if counts.keys() != {""} else ""
        )
        return Said(
            "{pairs:,} pairs, {images:,} images ({place}){texts}",
            "{pairs:,} 个图文对，{images:,} 张图片（{place}）{texts}",
            pairs=len(self.store),
            images=len(self.store.image_ids),
            place=self.store.path,
            texts=texts,
        )


def _hit(gallery: int, positives: int, k: int) -> float:
    return 1 - math.comb(gallery - positives, k) / math.comb(gallery, k) if gallery - positives >= k else 1.0


def flat_row(scores: RetrievalScores) -> dict[str, float | None]:
    """``t2i_r1`` … ``i2t_r10``, ``mean_recall``, in percent."""
    row: dict[str, float | None] = {}
    for short, direction in (("t2i", scores.text_to_image), ("i2t", scores.image_to_text)):
        for k in KS:
            row[f"{short}_r{k}"] = None if direction is None else direction.recall[k]
    return row | {"mean_recall": scores.mean_recall}


@dataclass(frozen=True)
class ClassScores:
    """`top5` is None below six classes, where it would say nothing."""

    images: int
    classes: int
    accuracy: float
    top5: float | None
    mean_per_class: float

    def value(self, name: str) -> float | None:
        return self.as_dict()[name]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ZeroShotAccuracy(Evaluator):
    """Accuracy over the labelled pictures of a folder or store: the class whose averaged prompts are nearest.

    Raises:
        RequestError: naming the setting that cannot be used.
    """

    tabled = ("accuracy",)

    def __init__(self, name: str, setting: ZeroShot) -> None:
        key, self.place = f"data.valid.{name}", setting.zero_shot
        try:
            self.classes = read_classes(setting.classes)
        except UserError as error:
            raise RequestError(f"{key}.classes: {error}") from None
        try:
            self.templates = read_templates(setting.templates, f"{key}.templates")
        except DataFault as error:
            raise RequestError(f"{key}.templates: {error}") from None
        try:
            self.source = open_source(setting.zero_shot)
            if self.source.kind == "texts":
                raise RequestError(f"{setting.zero_shot} is a file of texts; give a folder of images or a store")
            ids, labels = labelled_images(Path(setting.zero_shot), self.source, self.classes)
        except UserError as error:
            raise RequestError(f"{key}.zero_shot: {error}") from None
        self.read = self.source.read
        self.ids = [image_id for image_id, label in zip(ids, labels, strict=True) if label is not None]
        self.labels = [label for label in labels if label is not None]
        if not self.ids:
            raise RequestError(
                f"{key}.zero_shot: no picture of {setting.zero_shot} has a label (a sub-folder named like its class, or a "
                "class name as its text), so there is nothing to judge by"
            )

    def judge(self, name: str, encoder: SharedEncoder) -> tuple[ClassScores, None]:
        pictures = encoder.images(name, self.ids, self.read)
        words = average_prompts(encoder.texts(prompts(self.classes, self.templates)), self.classes, self.templates)
        found = score_classes(pictures @ words.T, self.labels, self.classes)
        assert found is not None  # there are labels
        return ClassScores(found.images, len(self.classes), found.top1, found.top5, found.mean_per_class), None

    def say(self, scores: ClassScores) -> list[str]:
        return [f"accuracy {scores.accuracy:.2f}"]

    def chance(self) -> dict[str, float | None]:
        return {"accuracy": 100 / len(self.classes)}

    def checksum(self) -> str:
        sha = hashlib.sha256(
            json.dumps([[[c.key, c.names] for c in self.classes], self.templates, self.labels]).encode()
        )
        if self.source.kind == "store":
            sha.update(self.source.checksum.encode())
        else:  # the source's own tells by dates, which a copy changes
            for image_id in self.ids:
                path = Path(self.place, image_id)
                try:
                    sha.update(hashlib.sha256(path.read_bytes()).digest())
                except OSError as error:
                    raise RequestError(f"{path} cannot be read ({error.strerror or error}). Bring it back.") from None
        return sha.hexdigest()

    def describe(self) -> str:
        return Said(
            "zero-shot, {images:,} images of {classes:,} classes ({place})",
            "零样本，{images:,} 张图片，{classes:,} 个类别（{place}）",
            images=len(self.ids),
            classes=len(self.classes),
            place=self.place,
        )


EVALUATORS: dict[type, Callable[[str, Any], Evaluator]] = {ZeroShot: ZeroShotAccuracy, BoxesSplit: BoxesFound}
"""By the section of the recipe that asks for it; a store is for `Recall`."""


def open_evaluator(
    name: str, valid: ValidStore | ZeroShot | BoxesSplit, open_split: Callable[[str, str], PairSource]
) -> Evaluator:
    """An entry of `data.valid`; `open_split` opens a store, given its place and the setting that names it."""
    if isinstance(valid, ValidStore):
        return Recall(open_split(valid.store, "data.valid"), valid.language)
    return EVALUATORS[type(valid)](name, valid)
