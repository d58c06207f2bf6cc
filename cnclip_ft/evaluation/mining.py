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

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from cnclip_ft.collectives import on_first, rank, together
from cnclip_ft.data.blocks import Blocks
from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.features.folder import INFO, mapped, read_split
from cnclip_ft.retrieval.recall import topk_below
from cnclip_ft.retrieval.tiles import DEFAULT_MEMORY, TIE
from data_tools.arrays import write_array
from data_tools.atomic import whole_file
from data_tools.columns import Where
from data_tools.errors import RequestError
from data_tools.language import detect_language
from data_tools.parallel import is_parallel
from data_tools.store import PairSource
from data_tools.store.beside import MOST

ASKERS = ("image", "text")
COUNT, BELOW = 8, 0.95
_AT_ONCE = 16384  # pairs of a block: what an interruption can cost, and the longest that one process waits for another
_WALK = "walk.json"
_ADVICE = "Free some space, or choose another --output: what is worked on lies beside it."
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


class NothingFound(RequestError):
    """No pair has a negative."""


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


@dataclass(frozen=True)
class _Block:
    """Pairs `rows` (int64), all of language number `language`, that are walked together."""

    number: int
    language: int
    rows: np.ndarray


class Walk:
    """The nearest captions of every pair, found by all processes in shares, block by block; what is done is not done again.

    ::

        walk/
            {pairs,group,spoken,asked,owned}.npy         the pairs, and which candidates stand on a group of pictures
            offered-L.npy, first-L.npy, gallery-L.npy    of language L: its candidates, their first texts and features
            walk.json                                    written last: what all this belongs to
            blocks/block-NUMBER.npz                      what was found

    Every process maps these files, so that captions and features are in memory once a machine, as pages that can be let go of. `prepare`
    is the first process's; blocks are the same however many processes there are, and so is, bit by bit, what is found.
    """

    def __init__(self, folder: Path, features: Path, wishes: Wishes) -> None:
        self.folder, self.features, self.wishes = folder, features, wishes
        self.languages: list[str] = []
        self.alike = 0

    def prepare(self, groups: Callable[[], np.ndarray], asking: Sequence[bool] | None) -> None:
        """Write what is walked over, unless it is there for this very request."""
        asks = b"" if asking is None else np.asarray(asking, bool).tobytes()
        told = [astuple(self.wishes), _AT_ONCE, *(hashlib.sha256(part).hexdigest() for part in (asks, self._about()))]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        file = self.folder / _WALK
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["key"] == key:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "blocks").mkdir(parents=True)
        split, alike = read_split(self.features), groups()
        captions, (image, text) = _Captions.of(split), split.positives.numpy().T
        candidate, group = captions.reading[text], alike[image]
        wanted = np.ones(len(image), bool) if asking is None else np.asarray(asking, bool)[image]
        self._write("pairs", split.positives.numpy())
        self._write("group", group)
        self._write("spoken", captions.language[candidate])
        self._write("asked", wanted)
        self._write("owned", np.unique(np.stack([group, candidate], 1), axis=0))
        offered = np.unique(candidate)  # a text without a picture may stand on any
        for language in range(len(captions.languages)):
            told_in = offered[captions.language[offered] == language]
            firsts = captions.firsts[told_in]
            self._write(f"offered-{language}", told_in)
            self._write(f"first-{language}", firsts)
            parts = np.split(firsts, range(_AT_ONCE, len(firsts), _AT_ONCE))
            shape = (len(firsts), split.text_features.shape[1])
            with whole_file(self.folder / f"gallery-{language}.npy", advice=_ADVICE) as out:
                rows = (split.text_features[torch.from_numpy(part)].float().numpy() for part in parts)
                write_array(out, rows, shape, np.dtype(np.float32))
        several = len(alike) - int((np.unique(alike, return_counts=True)[1] == 1).sum())
        with whole_file(file, "w", advice=_ADVICE) as out:
            json.dump({"key": key, "languages": captions.languages, "alike": several}, out)

    def _about(self) -> bytes:
        return (self.features / INFO).read_bytes()

    def _write(self, name: str, array: np.ndarray) -> None:
        with whole_file(self.folder / f"{name}.npy", advice=_ADVICE) as file:
            write_array(file, [array], array.shape, array.dtype)

    def _map(self, name: str) -> np.ndarray:
        # Copy on write: torch wants memory it may write to; nothing here does.
        return np.load(self.folder / f"{name}.npy", mmap_mode="c")

    def open(self) -> list[_Block]:
        """What was prepared, and its blocks."""
        info = json.loads((self.folder / _WALK).read_text(encoding="utf-8"))
        self.languages, self.alike = info["languages"], info["alike"]
        self.pairs, self.group, self.spoken = (self._map(name) for name in ("pairs", "group", "spoken"))
        self.owned, self.asked = self._map("owned"), self._map("asked")
        self.image_features, self.text_features = mapped(self.features)
        blocks: list[_Block] = []
        for language in range(len(self.languages)):
            rows = np.flatnonzero(self.asked & (self.spoken == language))
            for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
                if len(part):
                    blocks.append(_Block(len(blocks), language, part))
        return blocks

    def search(self, block: _Block, memory: str | int, device: torch.device | str | None) -> dict[str, np.ndarray]:
        """`texts`, `scores`, `own` and `above` of a block's pairs, as `Mined` has them."""
        wishes, rows = self.wishes, block.rows
        image, text = torch.from_numpy(self.pairs[rows]).T
        own_text = self.text_features[text]
        asking = own_text if wishes.by == "text" else self.image_features[image]
        own = (asking.double() * own_text.double()).sum(1)
        found: dict[str, np.ndarray] = {
            "texts": np.full((len(rows), wishes.count), -1, np.int64),
            "scores": np.full((len(rows), wishes.count), -np.inf, np.float32),
            "own": own.numpy(),
            "above": np.zeros(len(rows), np.int64),
        }
        fits = own > 0  # of a caption that does not fit at all no share can be taken
        at = fits.numpy()
        if not at.any():
            return found
        scores, places, above = topk_below(
            asking[fits],
            torch.from_numpy(self._map(f"gallery-{block.language}")),
            wishes.count,
            self._owned(rows[at], self._map(f"offered-{block.language}")),
            wishes.below * own[fits] - TIE,  # who reaches it but for rounding reaches it
            memory=memory,
            device=device,
        )
        width, firsts = places.shape[1], torch.from_numpy(self._map(f"first-{block.language}"))
        found["texts"][at, :width] = torch.where(places >= 0, firsts[places.clamp_min(0)], -1).numpy()
        found["scores"][at, :width], found["above"][at] = scores.numpy(), above.numpy()
        return found

    def _owned(self, rows: np.ndarray, offered: np.ndarray) -> torch.Tensor:
        """Candidates that stand on a picture of the pair's group: int64 ``[m, 2]``, (place among `rows`, place among `offered`)."""
        groups = self.owned[:, 0]
        begin, end = (np.searchsorted(groups, self.group[rows], side) for side in ("left", "right"))
        row = np.repeat(np.arange(len(rows)), end - begin)
        steps = np.arange(len(row)) - np.repeat((end - begin).cumsum() - (end - begin), end - begin)
        candidate = self.owned[begin[row] + steps, 1]
        place = np.searchsorted(offered, candidate)
        there = (place < len(offered)) & (offered[np.minimum(place, len(offered) - 1)] == candidate)
        return torch.from_numpy(np.stack([row[there], place[there]], 1))

    def gather(self, blocks: Sequence[_Block], held: Blocks) -> Mined:
        """What was found of all blocks."""
        count = len(self.pairs)
        found = Mined(
            torch.from_numpy(self.pairs),
            torch.full((count, self.wishes.count), -1, dtype=torch.int64),
            torch.full((count, self.wishes.count), -torch.inf),
            torch.full((count,), torch.nan, dtype=torch.float64),
            torch.zeros(count, dtype=torch.int64),
            [self.languages[number] for number in self.spoken.tolist()],
            self.alike,
        )
        for block in blocks:
            for name, array in held.read(block.number).items():
                getattr(found, name)[torch.from_numpy(block.rows)] = torch.from_numpy(array)
        return found


def mine(
    features: Path,
    folder: Path,
    groups: Callable[[], np.ndarray],
    wishes: Wishes,
    asking: Sequence[bool] | None = None,
    *,
    memory: str | int = DEFAULT_MEMORY,
    device: torch.device | str | None = None,
) -> Mined | None:
    """Search for every pair, exactly and in bounded memory; all processes call it, and the first is told what was found (others: None).

    Args:
        features: a finished folder of features with images and texts.
        folder: for the walk; what lies there of this very request is gone on with.
        groups: gives int64 ``[images]``: like pictures have the same number. Asked for on the first process.
        asking: of every image, whether its pairs get negatives; None: all. The captions of all are candidates. Read on the first process.
        device: where scores are computed, and this process's, for what all tell each other.

    Raises:
        NothingFound: no pair has a negative.
        UserError: the disk is full.
    """
    walk, own_device = Walk(folder, features, wishes), torch.device(device or "cpu")
    on_first(lambda: walk.prepare(groups, asking), own_device)
    blocks = walk.open()
    held = Blocks(
        folder / "blocks",
        len(blocks),
        lambda number: walk.search(blocks[number], memory, device),
        advice=_ADVICE,
        what="looking for negatives",
    )
    with together(own_device):
        held.fill(own_device)
    if rank():
        return None
    found = walk.gather(blocks, held)
    if not len(found.counts.nonzero()):
        larger = ", or a larger share: --below 1" if wishes.below < 1 else ""
        raise NothingFound(
            "no pair gets a negative: every caption of another picture scores as high as the own one, reads the same, or there is none. "
            f"Take a checkpoint that was trained on such data{larger}"
        )
    return found


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
