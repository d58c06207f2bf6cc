"""Pictures with phrases and boxes, as a stage that learns boxes reads them: a row is a picture, with all that is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnclip_ft.data.pairs import PairTable, padded_length
from cnclip_ft.models.contract import Preprocessing, Tokenizer
from data_tools.errors import DataFault, RequestError
from data_tools.pictures import read_size
from data_tools.store import PairSource

_SEEN = 0.5  # share of a box that has to be seen to be learnt
_SAME = 5  # digits by which two boxes are one: a pixel of the largest picture is more


@dataclass(frozen=True)
class BoxedPicture:
    """What is said of a picture.

    Attributes:
        phrases: int64 ``[k]``, numbers of its phrases.
        boxes: float32 ``[b, 4]``, its boxes, each once: (x, y, w, h) in shares of the upright picture, in a table of what a tower sees.
        says: bool ``[b, k]``, whether a phrase is said of a box.
    """

    phrases: np.ndarray
    boxes: np.ndarray
    says: np.ndarray


@dataclass
class BoxTable(PairTable):
    """Rows are pictures with boxes: an image key is the picture's position in `store.image_ids`, a text key the row's number.

    `tokens` and `starts` count boxes, by which the rows of a batch are sorted; those of the phrases are in `phrases`, each phrase once
    however often it is said. `passed_over` pairs have no boxes.
    """

    phrases: PairTable | None = None
    pictures: tuple[BoxedPicture, ...] = ()
    passed_over: int = 0

    @property
    def boxes(self) -> int:
        return sum(len(picture.boxes) for picture in self.pictures)

    @property
    def said(self) -> np.ndarray:
        """Numbers of the phrases, as often as they are said."""
        return np.concatenate([picture.phrases for picture in self.pictures])

    def texts(
        self, numbers: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` of phrases, int64 ``[n, tokens]`` each."""
        assert self.phrases is not None
        ids = [self.phrases.token_ids(number) for number in numbers.tolist()]
        free = lengths and tokenizer.padding == "longest"
        return tokenizer.pad(ids, padded_length(max(map(len, ids)), lengths) if free else None)

    def batch(self, pairs: np.ndarray, tokenizer: Tokenizer, lengths: Sequence[int] = ()) -> dict[str, torch.Tensor]:
        """What pictures hold, padded to the most phrases ``k`` and boxes ``b`` of one.

        Returns:
            ``input_ids``, ``attention_mask``: ``[m, tokens]`` of the phrases of these pictures, each once; ``numbers``: int64 ``[m]``,
            which they are. ``asked``: int64 ``[n, k]``, their places in that list, −1 for none. ``boxes``: float32 ``[n, b, 4]``, centred.
            ``counts``: int64 ``[n]``. ``says``: bool ``[n, b, k]``. And keys ``[n]``.
        """
        held = [self.pictures[row] for row in pairs.tolist()]
        numbers, place = np.unique(np.concatenate([one.phrases for one in held]), return_inverse=True)
        phrases, boxes = (max(len(getattr(one, name)) for one in held) for name in ("phrases", "boxes"))
        asked = np.full((len(held), phrases), -1, dtype=np.int64)
        centred = np.zeros((len(held), boxes, 4), dtype=np.float32)
        says = np.zeros((len(held), boxes, phrases), dtype=bool)
        start = 0
        for row, one in enumerate(held):
            count, own = len(one.boxes), len(one.phrases)
            asked[row, :own] = place[start : start + own]
            start += own
            centred[row, :count, :2] = one.boxes[:, :2] + one.boxes[:, 2:] / 2
            centred[row, :count, 2:] = one.boxes[:, 2:]
            says[row, :count, :own] = one.says
        input_ids, attention_mask = self.texts(numbers, tokenizer, lengths)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "numbers": torch.from_numpy(numbers),
            "asked": torch.from_numpy(asked),
            "boxes": torch.from_numpy(centred),
            "counts": torch.tensor([len(one.boxes) for one in held]),
            "says": torch.from_numpy(says),
            "image_keys": torch.from_numpy(self.image_keys[pairs]),
            "text_keys": torch.from_numpy(self.text_keys[pairs]),
        }

    def others(self, count: int, seed: Sequence[int]) -> np.ndarray:
        """`count` phrases of the store (fewer where it has no more), drawn as often as they are said, each once: int64, a function of `seed`."""
        random, said = np.random.default_rng(list(seed)), self._said
        found: dict[int, None] = {}
        for _ in range(8):
            found |= dict.fromkeys(random.choice(said, 2 * count).tolist())
            if len(found) >= count:
                break
        return np.array(sorted(list(found)[:count]), dtype=np.int64)

    def __post_init__(self) -> None:
        self._said = self.said if self.pictures else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Boxed:
    """The phrases of a store that have boxes, each once; pictures by their ids, in the store's order; pairs `passed_over` have none."""

    texts: list[str]
    pictures: dict[int | str, BoxedPicture]
    passed_over: int


def read_boxed(store: PairSource, key: str, prepare: Callable[[list[str]], list[str]] = list) -> Boxed:
    """All that a store says with boxes.

    Args:
        key: of the recipe, for messages.
        prepare: texts → what tells them apart.

    Raises:
        RequestError: no phrase has boxes, or one is of a picture that is not there.
    """
    held: dict[int | str, list[tuple[str, list[list[float]]]]] = {}
    passed_over = 0
    if store.beside_counts.get("boxes"):
        for pair, beside in store.pairs_and_beside():
            if "boxes" in beside:
                held.setdefault(pair.image_id, []).append((pair.text, beside["boxes"]))
            else:
                passed_over += 1
    if not held:
        raise RequestError(
            f"{key}: no phrase of {store.path} has boxes. Import some, cnclip-ft data import boxes SOURCE --output DIR "
            f"(docs/data.md#phrases-with-boxes), and name that store: {key}=DIR"
        )
    known = [image_id for image_id in store.image_ids if image_id in held]
    if len(known) < len(held):
        lost = next(iter(held.keys() - set(known)))
        raise RequestError(f"{key}: {store.path} has boxes of picture {lost!r}, and no such picture. Build it again")
    texts = list(dict.fromkeys(text for said in held.values() for text, _ in said))
    prepared = prepare(texts)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(prepared))}
    number_of = {text: numbers[one] for text, one in zip(texts, prepared, strict=True)}
    first = {number_of[text]: text for text in reversed(texts)}
    pictures = {image_id: _picture([(number_of[text], boxes) for text, boxes in held[image_id]]) for image_id in known}
    return Boxed([first[number] for number in range(len(numbers))], pictures, passed_over)


def part_of(preprocessing: Preprocessing, store: PairSource, image_id: int | str) -> tuple[float, float, float, float]:
    """What of a store's picture a tower sees, (x, y, w, h) in shares of it; its size is read only where that matters."""
    if preprocessing.part(1, 2) == preprocessing.part(2, 1):
        return preprocessing.part(1, 1)
    width, height, turned = read_size(store.image(image_id))
    return preprocessing.part(*((height, width) if turned >= 5 else (width, height)))


def _part_or_whole(
    preprocessing: Preprocessing, store: PairSource, image_id: int | str
) -> tuple[float, float, float, float]:
    """As `part_of`; of a picture that cannot be read the whole: it is told of and replaced when it is to be decoded."""
    try:
        return part_of(preprocessing, store, image_id)
    except DataFault:
        return 0.0, 0.0, 1.0, 1.0


def _seen(picture: BoxedPicture, part: tuple[float, float, float, float]) -> BoxedPicture | None:
    """A picture's boxes as a tower sees them, in shares of `part`: cut at its edge, and gone where less than half of one is seen."""
    if part == (0.0, 0.0, 1.0, 1.0):
        return picture
    low, size = np.array(part[:2], np.float32), np.array(part[2:], np.float32)
    begin = (picture.boxes[:, :2] - low) / size
    end = begin + picture.boxes[:, 2:] / size
    inside = np.clip(end, 0, 1) - np.clip(begin, 0, 1)
    kept = inside.prod(1) >= _SEEN * (end - begin).prod(1)
    boxes = np.concatenate([np.clip(begin, 0, 1), inside], axis=1)[kept]
    says = picture.says[kept]
    named = says.any(0)
    return BoxedPicture(picture.phrases[named], boxes, says[:, named]) if len(boxes) else None


def build_box_table(store: PairSource, tokenizer: Tokenizer, preprocessing: Preprocessing, key: str) -> BoxTable:
    """The pictures of a store that have boxes, as a tower sees them, their phrases tokenised; raises as `read_boxed`."""
    found = read_boxed(store, key, lambda texts: tokenizer.prepared(texts)[0])
    positions = {image_id: number for number, image_id in enumerate(store.image_ids)}
    seen = {
        image_id: own
        for image_id, picture in found.pictures.items()
        if (own := _seen(picture, _part_or_whole(preprocessing, store, image_id))) is not None
    }
    if not seen:
        raise RequestError(
            f"{key}: the image tower sees the middle of a picture, and no box of {store.path} lies there"
        )
    pictures, rows = tuple(seen.values()), np.arange(len(seen), dtype=np.int64)
    keys = np.array([positions[image_id] for image_id in seen], dtype=np.int64)
    starts = np.cumsum([0, *(len(picture.boxes) for picture in pictures)], dtype=np.int64)
    phrases = _phrases(tokenizer.encode(found.texts), tokenizer)
    nothing = np.empty(0, dtype=np.intc)
    return BoxTable(
        keys, rows, nothing, starts, phrases.cut, phrases=phrases, pictures=pictures, passed_over=found.passed_over
    )


def _phrases(ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> PairTable:
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    tokens = np.fromiter((token for each in ids for token in each), dtype=np.intc, count=int(starts[-1]))
    numbers = np.arange(len(ids), dtype=np.int64)
    return PairTable(numbers, numbers, tokens, starts, sum(len(each) == tokenizer.context_length for each in ids))


def _picture(said: list[tuple[int, list[list[float]]]]) -> BoxedPicture:
    """Boxes that are one, though several phrases name them, become one."""
    phrases = {number: place for place, number in enumerate(dict.fromkeys(number for number, _ in said))}
    boxes: dict[tuple[float, ...], int] = {}
    pairs = [
        (boxes.setdefault(tuple(round(one, _SAME) for one in box), len(boxes)), phrases[number])
        for number, own in said
        for box in own
    ]
    says = np.zeros((len(boxes), len(phrases)), dtype=bool)
    says[tuple(np.array(pairs).T)] = True
    return BoxedPicture(np.array(list(phrases), dtype=np.int64), np.array(list(boxes), dtype=np.float32), says)
