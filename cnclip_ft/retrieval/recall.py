"""Exact top-k and recall both ways over the whole pool, in bounded memory (modules `tiles`, `scan`).

The rank of a query is 1 + the number of gallery items that are not its positives and score at least as high as
its best positive: a tie counts against the model, so a model that gives everything the same feature does not
score 100. Recall@k is the share of queries with rank <= k. A query's other positives never push it down.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.retrieval.scan import Barred, Positives, RankLooker, TopLooker, sweep
from cnclip_ft.retrieval.tiles import DEFAULT_MEMORY, Side, full_precision, parse_memory, settle_device
from data_tools.language import LANGUAGES

KS = (1, 5, 10)
UNLABELLED = "unlabelled"


def topk(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best gallery items of every query, exact.

    Args:
        queries: ``[q, dim]``, any float type. gallery: ``[g, dim]``.
        k: at most g are given.
        memory: bound for what is allocated beside the features and the answer.
        device: where to compute; default where the queries lie.

    Returns:
        float32 scores and int64 gallery indices, both ``[q, min(k, g)]`` on the CPU, best first; among equal
        scores the lower index comes first, as in the official ``make_topk_predictions``.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    size, where = parse_memory(memory), settle_device(device, queries)
    with full_precision():
        q, g = Side(queries, where, size, "query"), Side(gallery, where, size, "gallery")
        top = TopLooker(q, g, k, size)
        sweep(q, g, [top], [], size)
    return top.values, top.indices


def topk_below(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    own: torch.Tensor,
    limit: torch.Tensor,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `topk`, of the items that are none of the query's own and score below its limit.

    Args:
        own: int64 ``[m, 2]``, (query, gallery item). limit: float64 ``[q]``, finite.

    Returns:
        Scores and indices as `topk` gives them, -inf and -1 where no item is left; and int64 ``[q]``: how many items that are
        none of its own reach the query's limit.
    """
    size, where = parse_memory(memory), settle_device(device, queries)
    with full_precision():
        q, g = Side(queries, where, size, "query"), Side(gallery, where, size, "gallery")
        barred = Barred(q, g, Positives.of(q, g, own), limit)
        top = TopLooker(q, g, k, size, barred)
        sweep(q, g, [top], [], size)
        top.indices.masked_fill_(top.values.isinf(), -1)
        above = barred.above.cpu()
    return top.values, top.indices, above


def ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    positives: torch.Tensor,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Rank of every query's best positive (definition: module docstring).

    Args:
        queries: ``[q, dim]``. gallery: ``[g, dim]``.
        positives: int64 ``[m, 2]``, (query, gallery item); repeated rows count once.

    Returns:
        int64 ``[q]`` on the CPU, 1 is best; 0 where a query has no positive.
    """
    size, where = parse_memory(memory), settle_device(device, queries)
    with full_precision():
        q, g = Side(queries, where, size, "query"), Side(gallery, where, size, "gallery")
        looker = RankLooker(q, g, Positives.of(q, g, positives))
        if len(positives):
            sweep(q, g, [looker], [], size)
        return looker.ranks()


@dataclass
class Direction:
    """Scores of one direction; `recall` in percent by k."""

    recall: dict[int, float]
    median_rank: float
    queries: int
    gallery: int

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)

    def as_dict(self) -> dict[str, Any]:
        scores: dict[str, Any] = {f"r{k}": value for k, value in self.recall.items()}
        return scores | {
            "mean_recall": self.mean_recall,
            "median_rank": self.median_rank,
            "queries": self.queries,
            "gallery": self.gallery,
        }


@dataclass
class RetrievalScores:
    """Both directions (None: no ground truth), the same per language and per other groups of texts, and what was left out and why."""

    text_to_image: Direction | None
    image_to_text: Direction | None
    by_language: dict[str, RetrievalScores] = field(default_factory=dict)
    by_group: dict[str, RetrievalScores] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    language: str | None = None  # that of all texts, where they have one

    @property
    def languages(self) -> dict[str, RetrievalScores]:
        """Each language by itself: its texts alone, among all images; texts that say none are in no part."""
        if self.language is not None:
            return {self.language: self}
        return {name: part for name, part in self.by_language.items() if name != UNLABELLED}

    @property
    def mean_recall(self) -> float | None:
        """Mean of all recalls of all directions, in percent; None without any ground truth."""
        means = [direction.mean_recall for direction in (self.text_to_image, self.image_to_text) if direction]
        return sum(means) / len(means) if means else None

    def value(self, name: str) -> float | None:
        """``mean_recall``, or ``text_to_image.r1`` and the like; None without ground truth in that direction.

        ``en.mean_recall`` is that of a language by itself, ``languages.mean_recall`` the mean of Chinese and English, each by itself;
        None where a language has no texts.
        """
        part, _, rest = name.partition(".")
        if part == "languages":
            both = [self.value(f"{language}.{rest}") for language in ("zh", "en")]
            known = [value for value in both if value is not None]
            return sum(known) / len(known) if len(known) == len(both) else None
        if part in LANGUAGES:
            found = self.languages.get(part)
            return None if found is None else found.value(rest)
        direction, _, score = name.rpartition(".")
        if not direction:
            return self.mean_recall
        way = self.text_to_image if direction == "text_to_image" else self.image_to_text
        return None if way is None else way.mean_recall if score == "mean_recall" else way.recall[int(score[1:])]

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "mean_recall": self.mean_recall,
            "text_to_image": self.text_to_image and self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text and self.image_to_text.as_dict(),
        }
        if self.by_language:
            values["by_language"] = {name: scores.as_dict() for name, scores in self.by_language.items()}
        if self.by_group:
            values["by_group"] = {name: scores.as_dict() for name, scores in self.by_group.items()}
        if self.notes:
            values["notes"] = list(self.notes)
        return values


@dataclass
class SplitRanks:
    """Ranks of the queries that have a positive, with their indices in the split, ready to be compared."""

    text_index: torch.Tensor
    text_ranks: torch.Tensor
    image_index: torch.Tensor
    image_ranks: torch.Tensor


def split_ranks(
    features: SplitFeatures, *, memory: str | int = DEFAULT_MEMORY, device: torch.device | str | None = None
) -> SplitRanks:
    """Ranks both ways over the whole pool, from one walk over the scores."""
    return _both_ways(features, None, memory, device)[0]


def ranks_and_topk(
    features: SplitFeatures,
    k: int = 10,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> tuple[SplitRanks, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`split_ranks`, and `topk` text→image and image→text, all from one walk over the scores."""
    found, tops = _both_ways(features, k, memory, device)
    by_text, by_image = ((top.values, top.indices) for top in tops)
    return found, by_text, by_image


def _both_ways(
    features: SplitFeatures, k: int | None, memory: str | int, device: torch.device | str | None
) -> tuple[SplitRanks, list[TopLooker]]:
    """The ranks, and with `k` what is best of texts and of images."""
    size, where = parse_memory(memory), settle_device(device, features.text_features)
    with full_precision():
        texts = Side(features.text_features, where, size, "text")
        images = Side(features.image_features, where, size, "image")
        positives = Positives.of(texts, images, features.positives.flip(1))
        rows, columns = [RankLooker(texts, images, positives)], [RankLooker(images, texts, positives.turned())]
        tops = [TopLooker(texts, images, k, size), TopLooker(images, texts, k, size)] if k else []
        if len(features.positives) or k:
            sweep(texts, images, [*rows, *tops[:1]], [*columns, *tops[1:]], size)
        by_text, by_image = rows[0].ranks(), columns[0].ranks()
    text_index, image_index = by_text.nonzero()[:, 0], by_image.nonzero()[:, 0]
    return SplitRanks(text_index, by_text[text_index], image_index, by_image[image_index]), tops


def summarise(found: torch.Tensor, gallery: int, ks: Sequence[int] = KS) -> Direction | None:
    """Ranks (1 is best) → recalls and median; None when there are none."""
    if len(found) == 0:
        return None
    recalls = {k: int((found <= k).sum()) / len(found) * 100 for k in ks}
    return Direction(recalls, float(statistics.median(found.tolist())), len(found), gallery)


def recall(
    features: SplitFeatures,
    ks: Sequence[int] = KS,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
    groups: Sequence[str] = (),
) -> RetrievalScores:
    """Recall@k both ways over the whole pool, and per language where texts carry one.

    Texts without a known image and images without a text ask no question but stay in the pool. A language's
    scores are those of the split with the texts of that language alone, among all images.

    Args:
        groups: a label for every text; scores are given for each label as for a language.
    """
    found = split_ranks(features, memory=memory, device=device)
    scores = _scores(features, found, ks)

    def per_label(labels: Sequence[str]) -> dict[str, RetrievalScores]:
        parts: dict[str, RetrievalScores] = {}
        for label in sorted(set(labels)) if len(set(labels)) > 1 else ():
            mine = torch.tensor([i for i, one in enumerate(labels) if one == label], dtype=torch.int64)
            part = features.with_texts(mine)
            by_image = ranks(part.image_features, part.text_features, part.positives, memory=memory, device=device)
            asked = torch.isin(found.text_index, mine)
            with_text = by_image.nonzero()[:, 0]
            own = SplitRanks(found.text_index[asked], found.text_ranks[asked], with_text, by_image[with_text])
            parts[label] = _scores(part, own, ks)
        return parts

    scores.by_language = per_label([language or UNLABELLED for language in features.languages])
    scores.language = features.languages[0] if len(set(features.languages)) == 1 else None
    scores.by_group = per_label(groups)
    return scores


def _scores(features: SplitFeatures, found: SplitRanks, ks: Sequence[int]) -> RetrievalScores:
    texts, images = len(features.text_ids), len(features.image_ids)
    scores = RetrievalScores(summarise(found.text_ranks, images, ks), summarise(found.image_ranks, texts, ks))
    for direction, query, target, asked, total in (
        ("text→image", "text", "image", len(found.text_index), texts),
        ("image→text", "image", "text", len(found.image_index), images),
    ):
        if asked == 0:
            scores.notes.append(f"{direction} left out: no {query} of the split has a known {target} (no ground truth)")
        elif asked < total:
            scores.notes.append(
                f"{direction}: {total - asked:,} of {total:,} {query}s have no known {target}; they stay in the pool and ask nothing"
            )
    return scores
