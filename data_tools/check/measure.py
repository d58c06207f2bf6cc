"""What a split holds: counted in one pass over its pairs and one over its pictures."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.bars import Bar
from data_tools.check.boxes import BoxCheck, BoxCounts
from data_tools.check.looking import SHOWN, Images
from data_tools.check.numbers import Spread, same_text
from data_tools.check.parallel import ParallelCheck, measure_parallel
from data_tools.language import detect_language
from data_tools.parallel import is_parallel, read_parallel
from data_tools.store import Id, PairSource, PairStore
from data_tools.store.checksum import Checksum, Order
from data_tools.store.damage import refuse_damage
from data_tools.store.layouts import Value

Lengths = Callable[[Sequence[str]], list[int]]
BATCHES = (128, 1024, 8192)
_TEXTS_AT_ONCE = 8192
Digest = bytes


@dataclass
class KeptColumn:
    """A column kept with the pictures: how many have it, how many different values, the most frequent ones."""

    images: int
    values: int
    most: list[tuple[Value, int]]

    @classmethod
    def of(cls, counts: Counter[Value]) -> KeptColumn:
        return cls(counts.total(), len(counts), counts.most_common(SHOWN))


@dataclass
class SplitCheck:
    """Everything `check` says of one split. Lists of examples are short; the numbers beside them are complete."""

    name: str
    path: str
    checksum: str  # computed from what was read, as is `order`
    images: int
    pairs: int
    texts: int
    lone_texts: int
    pairs_per_image: Spread | None
    images_without_text: int
    missing_images: int  # pairs whose image is not in the store
    repeated_texts: int  # pairs whose caption stands on another image as well
    repeated_images: int  # images whose content another id has too
    false_negatives: dict[int, float | None]  # batch size → share of pairs, None above the split's size
    context_length: int
    token_lengths: Spread | None
    cut: float | None  # share of distinct texts longer than the context length
    characters: Spread | None
    languages: dict[str, int]
    formats: dict[str, int]
    modes: dict[str, int]
    widths: Spread | None
    heights: Spread | None
    bytes: int
    undecodable: int
    decoded: bool
    order: str = ""
    skipped: dict[str, int] = field(default_factory=dict)  # kind → number of what the build left out (faults.jsonl)
    kept: dict[str, KeptColumn] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)  # pairs with negatives, a weight, boxes
    # As the store says, where it does.
    stated_checksum: str | None = None
    stated_order: str | None = None
    stated_images: int | None = None
    parallel: ParallelCheck | None = None
    boxes: BoxCheck | None = None
    examples: dict[str, list[Any]] = field(default_factory=dict)
    image_hashes: dict[Digest, Id] = field(default_factory=dict, repr=False)
    text_hashes: dict[Digest, str] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the hashes."""
        hidden = ("image_hashes", "text_hashes")
        return {name: _plain(value) for name, value in vars(self).items() if name not in hidden}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (ParallelCheck, BoxCheck)):
        return value.as_dict()
    return vars(value) if isinstance(value, (Spread, KeptColumn)) else value


def measure(
    store: PairSource,
    *,
    lengths: Lengths | None = None,
    context_length: int = 52,
    decode: bool = True,
    workers: int = 0,
    progress: bool = True,
) -> SplitCheck:
    """Look at every pair and every picture of `store`.

    Args:
        lengths: texts → lengths in tokens, special tokens included, uncut; None leaves them out.
        decode: decode every picture; False reads the headers only.
        workers: threads for pictures.
    """
    if isinstance(store, PairStore):
        refuse_damage(store, progress)
    images = Images(store, decode, workers, progress)
    pairs = _Pairs(store, images.numbers, images.groups, progress, images.order)
    content, order = Checksum(images.content.sums), images.order
    content.add(pairs.content.sums)
    texts = _Texts(pairs.distinct, lengths, progress)
    examples: dict[str, list[Any]] = {
        "undecodable": images.undecodable_examples,
        "repeated_images": images.repeated_examples(),
        "repeated_texts": pairs.repeated_examples(),
        "missing_images": pairs.missing_examples,
        "longest": texts.longest,
        "without_text": pairs.without_text(images.ids),
        "skipped": [fault for fault, _ in zip(store.left_out(), range(SHOWN), strict=False)],
    }
    return SplitCheck(
        name=store.name,
        path=str(store.path),
        checksum=content.hexdigest(),
        images=len(images.ids),
        pairs=len(store),
        texts=len(pairs.distinct),
        lone_texts=len(store.lone_texts),
        pairs_per_image=Spread.of(Counter(pairs.per_image.values())),
        images_without_text=len(images.ids) - len(pairs.per_image),
        missing_images=pairs.missing,
        repeated_texts=pairs.repeated(),
        repeated_images=images.repeated(),
        false_negatives={size: pairs.false_negatives(size) for size in BATCHES},
        context_length=context_length,
        token_lengths=Spread.of(texts.tokens),
        cut=texts.cut(context_length),
        characters=Spread.of(texts.characters),
        languages=dict(pairs.languages.most_common()),
        formats=dict(images.formats.most_common()),
        modes=dict(images.modes.most_common()),
        widths=Spread.of(images.widths),
        heights=Spread.of(images.heights),
        bytes=images.bytes,
        undecodable=images.undecodable,
        decoded=decode,
        examples=examples,
        order=order.hexdigest(),
        stated_checksum=store.stated_checksum,
        stated_order=store.stated_order,
        stated_images=store.image_count,
        skipped=dict(Counter(str(fault["kind"]) for fault in store.left_out()).most_common()),
        kept={name: KeptColumn.of(counts) for name, counts in images.kept.items()},
        beside=pairs.beside,
        boxes=pairs.boxes.check(SHOWN),
        parallel=measure_parallel(read_parallel(store)) if is_parallel(store) else None,
        image_hashes=images.first,
        text_hashes=pairs.first_text,
    )


class _Pairs:
    """One pass over the pairs: who stands with whom, and which texts there are."""

    def __init__(
        self,
        store: PairSource,
        numbers: dict[Id, int],
        image_groups: array[int],
        progress: bool,
        order: Order | None = None,
    ) -> None:
        self.content, order = Checksum(), order or Order()
        self.per_image: Counter[Id] = Counter()
        self.languages: Counter[str] = Counter()
        self.distinct: dict[Id, str] = {}
        self.first_text: dict[bytes, str] = {}
        self.beside: dict[str, int] = {}
        self.boxes = BoxCounts()
        self.missing, self.missing_examples = 0, list[list[Id]]()
        self._image_of, self._text_of = array("q"), array("q")  # of every pair: equal content, equal number
        text_numbers: dict[bytes, int] = {}
        for pair, beside in Bar(
            store.pairs_and_beside(),
            total=len(store),
            desc=f"{store.name}: pairs",
            unit="pair",
            shown=progress,
            delay=1.0,
        ):
            for kind in beside:
                self.beside[kind] = self.beside.get(kind, 0) + 1
            if "boxes" in beside:
                self.boxes.add(pair.text, beside["boxes"])
            self.content.pair(pair.image_id, pair.text_id, pair.text, beside)
            order.pair(pair.image_id, pair.text_id, pair.text)
            number = numbers.get(pair.image_id)
            if number is None:
                self.missing += 1
                if len(self.missing_examples) < SHOWN:
                    self.missing_examples.append([pair.image_id, pair.text_id])
                continue
            self.per_image[pair.image_id] += 1
            digest = same_text(pair.text)
            self._image_of.append(image_groups[number])
            self._text_of.append(text_numbers.setdefault(digest, len(text_numbers)))
            self.first_text.setdefault(digest, pair.text)
            if pair.text_id not in self.distinct:
                self.distinct[pair.text_id] = pair.text
                self.languages[pair.language or detect_language(pair.text) or "none"] += 1
        for text_id, text, language in store.lone_texts:
            self.content.pair(None, text_id, text)
            order.pair(None, text_id, text)
            self.distinct[text_id] = text
            self.first_text.setdefault(same_text(text), text)
            self.languages[language or detect_language(text) or "none"] += 1
        self._images, self._texts = Counter(self._image_of), Counter(self._text_of)
        self._both = Counter(zip(self._image_of, self._text_of, strict=True))

    def repeated(self) -> int:
        """Pairs whose text stands on a different picture, too."""
        return sum(count for (_, text), count in self._both.items() if self._texts[text] > count)

    def repeated_examples(self) -> list[list[Any]]:
        """[text, number of pairs], the most frequent first."""
        pictures = Counter(text for _, text in self._both)
        texts = list(self.first_text.values())
        return [[texts[text], count] for text, count in pictures.most_common(SHOWN) if count > 1]

    def without_text(self, ids: Sequence[Id]) -> list[Id]:
        found = (image_id for image_id in ids if image_id not in self.per_image)
        return [image_id for _, image_id in zip(range(SHOWN), found, strict=False)]

    def false_negatives(self, batch: int) -> float | None:
        """Share of pairs that meet, in a random batch, another pair with the same picture or the same text.

        Exact (drawing without replacement): with m such pairs among n, 1 − Π (1 − (batch − 1) / (n − 1 − k)) for k < m.
        """
        total = len(self._image_of)
        if batch > total:
            return None
        twins: Counter[int] = Counter()
        for (image, text), count in self._both.items():
            twins[self._images[image] + self._texts[text] - count - 1] += count
        expected = 0.0
        for others, count in twins.items():
            left = total - 1 - others  # pairs that are no twins
            if left < batch - 1:
                none = 0.0
            else:
                log = (
                    math.lgamma(left + 1)
                    - math.lgamma(left - batch + 2)
                    - math.lgamma(total)
                    + math.lgamma(total - batch + 1)
                )
                none = min(math.exp(log), 1.0)  # rounding can bring it above, and the share below 0
            expected += count * (1 - none)
        return round(expected / total, 6)


class _Texts:
    """Lengths of the distinct texts."""

    def __init__(self, texts: dict[Id, str], lengths: Lengths | None, progress: bool) -> None:
        self.characters = Counter(map(len, texts.values()))
        self.tokens: Counter[int] = Counter()
        self.longest: list[list[Any]] = []
        ids = list(texts)
        if lengths is None:
            return
        with Bar(total=len(ids), unit="text", desc="captions in tokens", shown=progress, delay=1.0) as bar:
            for start in range(0, len(ids), _TEXTS_AT_ONCE):
                some = ids[start : start + _TEXTS_AT_ONCE]
                found = lengths([texts[text_id] for text_id in some])
                self.tokens.update(found)
                self.longest += [[length, text_id, texts[text_id]] for text_id, length in zip(some, found, strict=True)]
                self.longest = sorted(self.longest, key=lambda row: -row[0])[:SHOWN]
                bar.update(len(some))

    def cut(self, context_length: int) -> float | None:
        if not self.tokens:
            return None
        longer = sum(count for length, count in self.tokens.items() if length > context_length)
        return round(longer / self.tokens.total(), 6)
