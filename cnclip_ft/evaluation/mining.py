"""Hard negatives of every pair: the nearest captions of other pictures, by a checkpoint, less those that may be true.

A caption that describes the picture as well as its own is no negative. Three rules leave such captions out:

* those of the picture itself, of pictures alike (`data_tools.alike`: equal bytes, another size or quality), and whatever reads the
  same as one of them (`reads_as`);
* those of another language than the own caption: telling languages apart is no hard question;
* those that score at least `below` times what the own caption scores. This is positive-aware mining, "TopK-PercPos" of
  NV-Retriever (Moreira et al., arXiv 2407.15831), whose share of 0.95 is the default here.

Where the picture asks, scores are cosines of picture and text, the very ones that the loss compares. Where the caption asks, they are
those of text and text, the own caption scores 1, and `below` is a cosine.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.retrieval.recall import topk_below
from cnclip_ft.retrieval.tiles import DEFAULT_MEMORY, TIE
from data_tools.bars import Bar
from data_tools.columns import Where
from data_tools.errors import RequestError
from data_tools.language import detect_language
from data_tools.parallel import is_parallel
from data_tools.store import PairSource
from data_tools.store.beside import MOST
from data_tools.tables import table, terminal_width

ASKERS = ("image", "text")
COUNT, BELOW = 8, 0.95
_AT_ONCE = 16384  # pairs whose features are gathered at once
_WORDS = re.compile(r"[^\W_]+")
_ARTICLES = {"a", "an", "the"}
_PARTICLES = re.compile("[的了着]|(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])")  # and spaces beside Chinese characters


@dataclass(frozen=True)
class Wishes:
    """`count` negatives a pair; `by` says who asks for them; `below`: the share of the own caption's score that none may reach."""

    count: int = COUNT
    by: str = "image"
    below: float = BELOW

    def check(self) -> None:
        """Raises:
        RequestError: a value that cannot be used.
        """
        if not 1 <= self.count <= MOST:
            raise RequestError(f"--count {self.count}: at least 1, and at most the {MOST:,} that a pair may keep")
        if self.by not in ASKERS:
            raise RequestError(f"--by {self.by!r}: one of {', '.join(ASKERS)}")
        if not 0 < self.below <= 1:
            raise RequestError(f"--below {self.below:g}: a share of the own caption's score, over 0 and at most 1")


def reads_as(text: str) -> str:
    """What two texts have in common that say the same: no case, width, punctuation, articles (a, the) or particles (的, 了, 着).

    A text in which one word is another is none that says the same: as a negative it is the best there is.
    """
    words = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    kept = " ".join(word for word in words if word not in _ARTICLES)
    return _PARTICLES.sub("", kept) or text


@dataclass
class Mined:
    """What was found. `texts` int64 ``[pairs, count]``: places of the negatives among the split's texts, the nearest first, -1 for none;
    `scores` beside it, `own` float64 ``[pairs]`` those of the own captions; NaN: not asked.

    `pairs` int64 ``[pairs, 2]`` are (image, text) as in `SplitFeatures.positives`. `languages` are those of the pairs, ``""`` for none.
    `above` counts the captions of others left out because they reached the limit, `alike` the pictures in groups of like ones.
    """

    pairs: torch.Tensor
    texts: torch.Tensor
    scores: torch.Tensor
    own: torch.Tensor
    above: torch.Tensor
    languages: list[str]
    alike: int = 0

    @property
    def asked(self) -> torch.Tensor:
        return ~self.own.isnan()

    @property
    def counts(self) -> torch.Tensor:
        return (self.texts >= 0).sum(1)

    def negatives(self, features: SplitFeatures) -> dict[tuple[int | str, int | str], list[str]]:
        """(image id, text id) → negatives, of the pairs that have any."""
        kept = {}
        for (image, text), row in zip(self.pairs.tolist(), self.texts.tolist(), strict=True):
            found = [features.texts[place] for place in row if place >= 0]
            if found:
                kept[features.image_ids[image], features.text_ids[text]] = found
        return kept


@dataclass(frozen=True)
class _Captions:
    """The captions of a split as candidates: texts that read the same in one language are one.

    `reading` int64 ``[texts]``: the candidate a text belongs to; `firsts` int64 ``[candidates]``: its first text; `language` of every
    candidate as a number into `languages`.
    """

    reading: np.ndarray
    firsts: np.ndarray
    language: np.ndarray
    languages: list[str]

    @staticmethod
    def of(features: SplitFeatures) -> _Captions:
        places: dict[tuple[str, str], int] = {}
        firsts: list[int] = []
        reading = np.empty(len(features.texts), np.int64)
        for number, (text, said) in enumerate(zip(features.texts, features.languages, strict=True)):
            key = (said or detect_language(text) or "", reads_as(text))
            if key not in places:
                places[key] = len(firsts)
                firsts.append(number)
            reading[number] = places[key]
        languages = sorted({language for language, _ in places})
        numbers = np.array([languages.index(language) for language, _ in places], np.int64)
        return _Captions(reading, np.array(firsts, np.int64), numbers, languages)


def mine(
    features: SplitFeatures,
    groups: np.ndarray,
    wishes: Wishes,
    asking: Sequence[bool] | None = None,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> Mined:
    """Search for every pair, exactly and in bounded memory.

    Args:
        groups: int64 ``[images]``: like pictures have the same number.
        asking: of every image, whether its pairs get negatives; None: all. The captions of all are candidates.

    """
    pairs = features.positives
    captions = _Captions.of(features)
    image, text = pairs.numpy().T
    candidate = captions.reading[text]
    owned = _Owned(groups, image, candidate)
    spoken = captions.language[candidate]
    count = len(pairs)
    found = Mined(
        pairs,
        torch.full((count, wishes.count), -1, dtype=torch.int64),
        torch.full((count, wishes.count), -torch.inf),
        torch.full((count,), torch.nan, dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
        [captions.languages[number] for number in spoken.tolist()],
        len(groups) - int((np.unique(groups, return_counts=True)[1] == 1).sum()),
    )
    wanted = np.ones(count, bool) if asking is None else np.asarray(asking, bool)[image]
    told = np.unique(candidate)  # a text without a picture may stand on any
    with Bar(total=int(wanted.sum()), desc="looking for negatives", unit=" pairs") as bar:
        for language in range(len(captions.languages)):
            offered = told[captions.language[told] == language]
            rows = np.flatnonzero(wanted & (spoken == language))
            gallery = features.text_features[torch.from_numpy(captions.firsts[offered])]
            for chosen in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
                if len(chosen):
                    _search(found, features, captions, owned, chosen, offered, gallery, wishes, memory, device)
                bar.update(len(chosen))
    return found


class _Owned:
    """The candidates that stand on any picture of a group, for the groups of some pairs."""

    def __init__(self, groups: np.ndarray, image: np.ndarray, candidate: np.ndarray) -> None:
        self.group = groups[image]
        both = np.unique(np.stack([self.group, candidate], 1), axis=0)
        self.groups, self.candidates = both[:, 0], both[:, 1]

    def of(self, rows: np.ndarray, offered: np.ndarray) -> torch.Tensor:
        """int64 ``[m, 2]``: (place among `rows`, place among `offered`, which ascends)."""
        begin, end = (np.searchsorted(self.groups, self.group[rows], side) for side in ("left", "right"))
        row = np.repeat(np.arange(len(rows)), end - begin)
        steps = np.arange(len(row)) - np.repeat((end - begin).cumsum() - (end - begin), end - begin)
        candidate = self.candidates[begin[row] + steps]
        place = np.searchsorted(offered, candidate)
        there = (place < len(offered)) & (offered[np.minimum(place, len(offered) - 1)] == candidate)
        return torch.from_numpy(np.stack([row[there], place[there]], 1))


def _search(
    found: Mined,
    features: SplitFeatures,
    captions: _Captions,
    owned: _Owned,
    rows: np.ndarray,
    offered: np.ndarray,
    gallery: torch.Tensor,
    wishes: Wishes,
    memory: str | int,
    device: torch.device | str | None,
) -> None:
    image, text = found.pairs[torch.from_numpy(rows)].T
    own_text = features.text_features[text]
    asking = own_text if wishes.by == "text" else features.image_features[image]
    own = (asking.double() * own_text.double()).sum(1)
    found.own[torch.from_numpy(rows)] = own
    fits = own > 0  # of a caption that does not fit at all no share can be taken
    rows, asking = rows[fits.numpy()], asking[fits]
    if not len(rows):
        return
    scores, places, above = topk_below(
        asking,
        gallery,
        wishes.count,
        owned.of(rows, offered),
        wishes.below * own[fits] - TIE,  # who reaches it but for rounding reaches it
        memory=memory,
        device=device,
    )
    at, width = torch.from_numpy(rows), places.shape[1]
    firsts = torch.from_numpy(captions.firsts[offered])
    found.texts[at, :width] = torch.where(places >= 0, firsts[places.clamp_min(0)], -1)
    found.scores[at, :width] = scores
    found.above[at] = above


_HEADS = ["language", "pairs", "asked for", "with negatives", "negatives a pair", "of the own score", "left out: over the limit", "own caption fits not"]  # fmt: skip


def lines(found: Mined, wishes: Wishes) -> list[str]:
    """For people: a table by language, and of all where there are several; what was left out and why.

    Raises:
        RequestError: no pair has a negative.
    """
    counts, kinds = found.counts, Counter(found.languages)
    share = torch.where(found.texts >= 0, found.scores.double() / found.own[:, None], 0.0).sum(1)
    rows = []
    for name in [*kinds, *(["all"] if len(kinds) > 1 else [])]:
        here = torch.tensor([name in ("all", language) for language in found.languages])
        negatives, some = int(counts[here].sum()), int((counts[here] > 0).sum())
        rows.append(
            [
                name or "none",
                f"{int(here.sum()):,}",
                f"{int((here & found.asked).sum()):,}",
                f"{some:,}",
                f"{negatives / some:.1f}" if some else "",
                f"{float(share[here].sum()) / negatives:.1%}" if negatives else "",
                f"{int(found.above[here].sum()):,}",
                f"{int((here & (found.own <= 0)).sum()):,}",
            ]
        )
    asker = "its picture" if wishes.by == "image" else "its caption"
    said = [
        table(_HEADS, rows, width=terminal_width()),
        f"for every pair the nearest captions of other pictures, at most {wishes.count}, as {asker} asks. Left out are those that score "
        f"{100 * wishes.below:g}% of what the own caption scores, or more; those that read like a caption of the picture; those of another language",
        f"pictures alike, which lend each other no negatives: {found.alike:,}",
    ]
    without = int((found.asked & (counts == 0)).sum())
    if without == int(found.asked.sum()):
        larger = ", or a larger share: --below 1" if wishes.below < 1 else ""
        raise RequestError(
            "no pair gets a negative: every caption of another picture scores as high as the own one, reads the same, or there is none. "
            f"Take a checkpoint that was trained on such data{larger}"
        )
    if without:
        said.append(f"without any: {without:,} pairs")
    return said


def examples(found: Mined, features: SplitFeatures, most: int = 3) -> list[str]:
    """Own captions with their nearest negatives and scores, of pairs evenly over the split."""
    rows = (found.counts > 0).nonzero()[:, 0]
    said = []
    for row in rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()].tolist() if len(rows) else ():
        image, text = found.pairs[row].tolist()
        said.append(f"{features.image_ids[image]}: {features.texts[text]} ({float(found.own[row]):.4f})")
        for place, score in list(zip(found.texts[row].tolist(), found.scores[row].tolist(), strict=True))[:3]:
            if place >= 0:
                said.append(f"  not: {features.texts[place]} ({score:.4f})")
    return said


def refuse_store(store: PairSource) -> None:
    """Raises:
    RequestError: it has no picture with a caption.
    """
    if is_parallel(store):
        raise RequestError(
            f"{store.path} holds parallel text, which has no pictures: negatives are captions of other pictures. "
            "Name a store of pictures and captions"
        )
    if not len(store):
        raise RequestError(
            f"{store.path}: no picture has a caption ({store.image_count:,} pictures, {len(store.lone_texts):,} texts without one): "
            "there is nothing to find negatives for. Name a store with pairs"
        )


def asked_pictures(store: PairSource, where: Where) -> list[bool] | None:
    """Of every picture, whether its pairs get negatives; None: all.

    Raises:
        RequestError: an unknown column, or no picture meets it.
    """
    if not where:
        return None
    where.check(store.columns, store.path)
    asking = [where.holds(store.columns_of(image_id)) for image_id in store.image_ids]
    if not any(asking):
        raise RequestError(f"{store.path}: no picture meets {where}")
    return asking
