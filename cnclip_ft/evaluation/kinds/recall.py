"""A store judged by recall@k both ways over its whole pool, never in-batch accuracy; per language where texts carry one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from cnclip_ft.evaluation.kinds.contract import Evaluator
from cnclip_ft.recipe_section import Language, Place
from cnclip_ft.recipe_valid import ValidSet
from data_tools.errors import RequestError
from data_tools.words import Said, joined

if TYPE_CHECKING:
    from cnclip_ft.features.encode import SplitFeatures, SplitTexts
    from cnclip_ft.features.shared_encoder import SharedEncoder
    from cnclip_ft.retrieval.recall import RetrievalScores
    from data_tools.store import PairSource

KS = (1, 5, 10)
BY_LANGUAGE = ("zh", "en", "mixed", "languages")
"""What scores of a language by itself begin with, ``en.text_to_image.r1``; ``languages``: one mean of Chinese and English."""


class ValidStore(ValidSet):
    """A store to judge on, whose texts do not all say their language."""

    store: Place
    """The store."""
    language: Language | None = None
    """Of texts that do not say theirs."""

    scores = (
        "mean_recall",
        *(f"{way}.{n}" for way in ("text_to_image", "image_to_text") for n in ("r1", "r5", "r10", "mean_recall")),
    )

    @classmethod
    def has_score(cls, score: str) -> bool:
        language, _, rest = score.partition(".")
        return score in cls.scores or (language in BY_LANGUAGE and rest in cls.scores)

    @classmethod
    def offer(cls) -> str:
        return (
            "best_by=mean_recall, or best_by=text_to_image.r1 (or .r5, .r10, .mean_recall, or image_to_text), "
            "best_by=en.text_to_image.r1 for a language by itself (or zh), best_by=languages.mean_recall for the mean of both, "
            "best_by='SPLIT: mean_recall' when another than the first validation split decides"
        )

    def setting(self, above: str) -> str:
        return above  # a path alone is one as well

    def open(self, name: str, open_split: Callable[[str, str], PairSource]) -> Recall:
        return Recall(open_split(self.store, "data.valid"), self.language)


class Recall(Evaluator):
    """Recall over the pairs of `store`.

    Args:
        language: of texts that do not say theirs.
    """

    def __init__(self, store: PairSource, language: str | None = None) -> None:
        if len(store) == 0:
            raise RequestError(f"data.valid: {store.path} has no pairs, so there is nothing to judge by")
        self.store, self.language = store, language

    @cached_property
    def texts(self) -> SplitTexts:
        from cnclip_ft.features.encode import read_texts

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
        from cnclip_ft.retrieval.recall import recall

        features = encoder.split(name, self.texts, self.store.image)
        return recall(features, ks=KS), features

    def say(self, scores: RetrievalScores) -> list[str]:
        languages = [f"{lang} {part.mean_recall:.2f}" for lang, part in scores.by_language.items() if part.mean_recall]
        return [f"{scores.mean_recall:.2f}", *languages]

    def chance(self) -> dict[str, float | None]:
        """Expected recall of a random order: the mean over queries of the chance that a positive is among the first k."""
        import torch

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
