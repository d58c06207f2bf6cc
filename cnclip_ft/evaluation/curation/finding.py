"""What of a store is better left out: pictures like others, captions that do not fit, texts that stand on too many pictures.

Limits are measured on the store itself with the checkpoint at hand, for cosines of two models cannot be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cnclip_ft.evaluation.options import Opened
from cnclip_ft.evaluation.thresholds.calibration import cosines, sampled_scores
from cnclip_ft.features.encode import SplitFeatures, encode_images, evaluating
from cnclip_ft.retrieval import approximate
from cnclip_ft.retrieval.exact import ExactSearch
from data_tools.alike import Groups, same_picture
from data_tools.bars import Bar
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import Reencoding, read_header, reencode
from data_tools.store import Id, PairSource
from data_tools.words import Said

_COPIES = 200  # pictures that are encoded a second time, smaller and compressed, to see how alike a copy is
_FOUND = 0.95  # of such copies reach the limit
_NEIGHBOURS, _ASKED = 16, 1024  # looked at a picture; pictures asked at once
_EXACTLY = 200_000  # pictures up to which every pair is compared; beyond, faiss proposes where it is installed
_WRONG, _MOST_BELOW = 0.9, 0.25  # of captions of other pictures below the limit; of the store's own at most
# Pictures whose neighbours are looked at for strangers, expected strangers above the limit per picture, and the share of copies
# below which the checkpoint cannot tell pictures apart.
_LOOKED_AT, _STRANGERS, _FEWEST = 500, 0.01, 0.5


@dataclass
class Wishes:
    """None: measured (`near`, `fit`), or 1 % of the pictures and at least 20 (`most`)."""

    near: float | None = None
    fit: float | None = None
    most: int | None = None
    negatives: int = 5
    seed: int = 0

    def check(self) -> None:
        """Raises:
        RequestError: a limit is no cosine, or no count.
        """
        for name in ("near", "fit"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise RequestError(f"--{name} {value}: a cosine lies between -1 and 1")
        if self.most is not None and self.most < 1:
            raise RequestError(f"--most {self.most}: at least 1")


@dataclass
class Group:
    """Like pictures: the one that stays (the largest), the others with their cosine to it."""

    stays: Id
    others: list[tuple[Id, float]]


@dataclass
class Misfit:
    """A pair whose caption fits no better than that of another picture."""

    image_id: Id
    text_id: Id
    text: str
    score: float


@dataclass
class Crowd:
    """A text on many pictures; `leaves` are the pictures it fits least."""

    text: str
    images: int
    leaves: list[tuple[Id, Id, float]]  # image id, text id, score
    stays: list[Id]  # examples


@dataclass
class Curation:
    """What was found; `near`, `fit`, `most` are the limits, `said` how they came to be."""

    near: float
    fit: float
    most: int
    said: list[str]
    images: int
    pairs: int
    groups: list[Group] = field(default_factory=list)
    misfits: list[Misfit] = field(default_factory=list)  # the worst first
    just_fit: list[Misfit] = field(default_factory=list)  # the nearest above the limit
    crowds: list[Crowd] = field(default_factory=list)

    @property
    def dropped_images(self) -> set[Id]:
        return {image_id for group in self.groups for image_id, _ in group.others}

    @property
    def dropped_pairs(self) -> set[tuple[Id, Id]]:
        """(image id, text id) that go although their picture may stay."""
        found = {(misfit.image_id, misfit.text_id) for misfit in self.misfits}
        return found | {(image_id, text_id) for crowd in self.crowds for image_id, text_id, _ in crowd.leaves}

    def lines(self) -> list[str]:
        """For people."""
        leaving = sum(len(crowd.leaves) for crowd in self.crowds)
        return [
            *self.said,
            Said(
                "{like:,} of {images:,} pictures are like another, in {groups:,} groups",
                "{images:,} 张图片中有 {like:,} 张与另一张相似，共 {groups:,} 组",
                like=len(self.dropped_images),
                images=self.images,
                groups=len(self.groups),
            ),
            Said(
                "{misfits:,} of {pairs:,} captions do not fit their picture",
                "{pairs:,} 条文本中有 {misfits:,} 条与图片不符",
                misfits=len(self.misfits),
                pairs=self.pairs,
            ),
            Said(
                "{crowds:,} texts stand on more than {most:,} pictures; {leaving:,} of their pairs are beyond that",
                "{crowds:,} 条文本出现在超过 {most:,} 张图片上；其中超出的有 {leaving:,} 对",
                crowds=len(self.crowds),
                most=self.most,
                leaving=leaving,
            ),
        ]

    def records(self) -> list[dict[str, Any]]:
        """Everything that is left out, one by one."""
        rows: list[dict[str, Any]] = []
        for group in self.groups:
            rows += [{"why": "like", "image_id": i, "like": group.stays, "score": score} for i, score in group.others]
        rows += [
            {"why": "misfit", "image_id": m.image_id, "text_id": m.text_id, "text": m.text, "score": m.score}
            for m in self.misfits
        ]
        for crowd in self.crowds:
            rows += [
                {"why": "crowd", "image_id": i, "text_id": t, "text": crowd.text, "score": score}
                for i, t, score in crowd.leaves
            ]
        return rows


def curate(
    store: PairSource, features: SplitFeatures, opened: Opened, wishes: Wishes, say: Callable[[str], None] = print
) -> Curation:
    """Look at all pictures and pairs of `store`.

    Args:
        features: of the store, by the model of `opened`.

    Raises:
        RequestError: no pairs; or the checkpoint cannot tell pictures or captions apart.
    """
    wishes.check()
    if not len(features.positives):
        raise RequestError(f"{store.path} has no pairs to curate")
    near, near_said = _near_limit(store, features, opened, wishes)
    fit, fit_said = _fit_limit(features, opened, wishes)
    most = wishes.most if wishes.most is not None else max(20, len(features.image_ids) // 100)
    found = Curation(near, fit, most, [near_said, fit_said], len(features.image_ids), len(features.positives))
    found.groups = _like(store, features, near, opened, say)
    gone, scores = found.dropped_images, cosines(features, features.positives).numpy()
    _misfits(found, features, scores, gone)
    _crowds(found, features, scores, gone)
    return found


def _near_limit(store: PairSource, features: SplitFeatures, opened: Opened, wishes: Wishes) -> tuple[float, str]:
    if wishes.near is not None:
        return wishes.near, Said(
            "pictures with a cosine of {near:.4f} and more are alike (given)",
            "余弦不低于 {near:.4f} 的图片算相似（给定）",
            near=wishes.near,
        )
    generator = torch.Generator().manual_seed(wishes.seed)
    chosen = torch.randperm(len(features.image_ids), generator=generator)[:_COPIES].sort().values
    copies: list[bytes] = []
    rows: list[int] = []
    for row in chosen.tolist():
        data = store.image(features.image_ids[row])
        try:
            header = read_header(data)
            side = max(16, max(header.width, header.height) // 2)
            copies.append(reencode(data, Reencoding(max_side=side, quality=60)))
            rows.append(row)
        except DataFault:
            continue  # what cannot be decoded was refused by the encoding
    with evaluating(opened.model, dtype=opened.dtype):
        again = encode_images(opened.model, range(len(copies)), copies.__getitem__, batch_size=opened.batch_size)
    own = (again.double() * features.image_features[rows].double()).sum(1)
    limit = float(own.quantile(1 - _FOUND))
    allowed, highest = _strangers(store, features, limit, opened, generator)
    if highest is not None:
        limit = float(np.nextafter(np.float32(highest), np.float32(2)))
    share = float((own >= limit).double().mean())
    if share < _FEWEST:
        raise RequestError(
            f"this checkpoint tells these pictures apart too badly: above a cosine of {limit:.5f}, where at most {_STRANGERS:.0%} of the "
            f"pictures meet another one, lie {share:.0%} of copies at half the size; {_FEWEST:.0%} at least have to. "
            f"Take one that was trained on such pictures, or give a limit and look at the page: --near {limit:.5f}"
        )
    return limit, Said(
        "pictures with a cosine of {limit:.4f} and more are alike: {found:.0%} of {copies} copies at half the size and quality 60 "
        "reach it, and at most {strangers} of {looked:,} pictures have another one above it that is not the same picture",
        "余弦不低于 {limit:.4f} 的图片算相似：{copies} 份缩小一半、质量 60 的副本中有 {found:.0%} 达到它；{looked:,} 张图片中至多 {strangers} "
        "张有并非同一图片的另一张高于它",
        limit=limit,
        found=share,
        copies=len(rows),
        strangers=allowed,
        looked=min(_LOOKED_AT, len(features.image_ids)),
    )


def _strangers(
    store: PairSource, features: SplitFeatures, limit: float, opened: Opened, generator: torch.Generator
) -> tuple[int, float | None]:
    """(how many strangers are allowed, the cosine of the first one too many; None: `limit` lets no more through).

    A stranger is a neighbour whose pixels are another picture's (`data_tools.alike`). Counted is for each picture, not for each
    pair of pictures: of a thousand times as many pictures each has a thousand times as many chances to meet one.
    """
    images = features.image_features
    asked = torch.randperm(len(images), generator=generator)[:_LOOKED_AT].sort().values
    allowed, met = int(_STRANGERS * len(asked)), 0
    search = ExactSearch(images, float(images.norm(dim=1).max()), opened.device)
    scores, numbers = search.search(images[asked], _NEIGHBOURS)
    near = (scores >= limit) & (numbers >= 0) & (numbers != asked[:, None])
    rows, places = near.nonzero(as_tuple=True)
    for at in scores[rows, places].argsort(descending=True).tolist():
        row, place = int(rows[at]), int(places[at])
        one, other = (features.image_ids[n] for n in (int(asked[row]), int(numbers[row, place])))
        met += not same_picture(store.image(one), store.image(other))
        if met > allowed:
            return allowed, float(scores[row, place])
    return allowed, None


def _fit_limit(features: SplitFeatures, opened: Opened, wishes: Wishes) -> tuple[float, str]:
    if wishes.fit is not None:
        return wishes.fit, Said(
            "captions below a cosine of {fit:.4f} do not fit (given)",
            "余弦低于 {fit:.4f} 的文本算不符（给定）",
            fit=wishes.fit,
        )
    scores, labels = sampled_scores(features, wishes.negatives, wishes.seed, opened.model.tokenizer.prepare)
    others = scores[~labels].sort().values  # `quantile` takes 16 million values at most
    limit = float(others[int(_WRONG * (len(others) - 1))])
    below = float((scores[labels] < limit).double().mean())
    if below > _MOST_BELOW:
        raise RequestError(
            f"this checkpoint cannot tell captions apart: {below:.1%} of the store's own fit no better than {_WRONG:.0%} of "
            "those of other pictures. Take one that was trained on such data, or give a limit with --fit"
        )
    return limit, Said(
        "captions below a cosine of {limit:.4f} do not fit: {wrong:.0%} of {others:,} captions of other pictures lie there, and "
        "{below:.1%} of the store's own",
        "余弦低于 {limit:.4f} 的文本算不符：{others:,} 条其他图片的文本中有 {wrong:.0%} 低于它，数据仓自身的有 {below:.1%}",
        limit=limit,
        wrong=_WRONG,
        others=len(others),
        below=below,
    )


def _like(
    store: PairSource, features: SplitFeatures, near: float, opened: Opened, say: Callable[[str], None]
) -> list[Group]:
    images = features.image_features
    count, alike = len(images), Groups(len(images))
    search: Any = ExactSearch(images, float(images.norm(dim=1).max()), opened.device)
    if count > _EXACTLY:
        if approximate.has_faiss():
            search = approximate.build(images.numpy(), "ivf", float(images.norm(dim=1).max()), say)
        else:
            say(
                f"note: every one of {count:,} pictures is compared with every other, which takes long; {approximate.MISSING}"
            )
    with Bar(total=count, desc="looking for like pictures", unit=" pictures") as bar:
        for start in range(0, count, _ASKED):
            scores, numbers = search.search(images[start : start + _ASKED], _NEIGHBOURS)
            rows, places = ((scores >= near) & (numbers >= 0)).nonzero(as_tuple=True)
            alike.join((rows + start).numpy(), numbers[rows, places].numpy())
            bar.update(len(scores))
    members: dict[int, list[int]] = {}
    for number, first in enumerate(alike.firsts().tolist()):
        members.setdefault(first, []).append(number)
    return [group for rows in members.values() if len(rows) > 1 for group in _groups(store, features, rows, near)]


def _groups(store: PairSource, features: SplitFeatures, rows: list[int], near: float) -> list[Group]:
    """A chain of like pictures as groups around the largest ones: what goes is itself like the one that stays."""

    def pixels(row: int) -> int:
        try:
            header = read_header(store.image(features.image_ids[row]))
        except DataFault:
            return 0
        return header.width * header.height

    left, ids, found = sorted(rows, key=lambda row: (-pixels(row), row)), features.image_ids, []
    while left:
        stays, others = left[0], left[1:]
        scores = (features.image_features[others] @ features.image_features[stays]).tolist()
        like = {row: score for row, score in zip(others, scores, strict=True) if score >= near}
        if like:
            found.append(
                Group(ids[stays], [(ids[row], round(like[row], 6)) for row in sorted(like, key=lambda row: -like[row])])
            )
        left = [row for row in others if row not in like]
    return found


_JUST = 24


def _misfits(found: Curation, features: SplitFeatures, scores: np.ndarray, gone: set[Id]) -> None:
    order = np.argsort(scores, kind="stable")
    pairs = features.positives.tolist()
    for row in order.tolist():
        image, text = pairs[row]
        if features.image_ids[image] in gone:
            continue
        misfit = Misfit(
            features.image_ids[image], features.text_ids[text], features.texts[text], round(float(scores[row]), 6)
        )
        if scores[row] < found.fit:
            found.misfits.append(misfit)
        elif len(found.just_fit) < _JUST:
            found.just_fit.append(misfit)
        else:
            break


def _crowds(found: Curation, features: SplitFeatures, scores: np.ndarray, gone: set[Id]) -> None:
    """Of texts that read the same, those pairs stay that fit best."""
    dropped = found.dropped_pairs
    keys = [" ".join(text.casefold().split()) for text in features.texts]
    rows: dict[str, list[int]] = {}
    pairs = features.positives.tolist()
    counts = Counter(keys[text] for _, text in pairs)
    for row, (image, text) in enumerate(pairs):
        ids = features.image_ids[image], features.text_ids[text]
        if counts[keys[text]] > found.most and ids[0] not in gone and ids not in dropped:
            rows.setdefault(keys[text], []).append(row)
    for own in rows.values():
        own.sort(key=lambda row: -scores[row])
        if len(own) <= found.most:
            continue
        leaves = [
            (features.image_ids[pairs[row][0]], features.text_ids[pairs[row][1]], round(float(scores[row]), 6))
            for row in own[found.most :]
        ]
        stays = [features.image_ids[pairs[row][0]] for row in own[:4]]
        found.crowds.append(Crowd(features.texts[pairs[own[0]][1]], len(own), leaves, stays))
    found.crowds.sort(key=lambda crowd: -crowd.images)
