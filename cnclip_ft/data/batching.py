"""The order of the pairs: random, without repeated images or texts in a batch where that can be had.

It is known for every step in advance, so that a run can be continued at any step without replaying the ones before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import numpy as np
from torch.utils.data import Sampler

from cnclip_ft.data.captions import OneCaption
from cnclip_ft.data.device_decoding import OnDevice
from cnclip_ft.data.pairs import PairDataset, PairTable, Span
from cnclip_ft.data.pictures import picture_loader
from cnclip_ft.data.transport import Batches, Collate, SharedBlocks
from cnclip_ft.data.visits import Members, Part, Visits
from cnclip_ft.models.contract import Tokenizer
from data_tools.errors import RequestError

VISITS = 1  # what states say of this order; 0, or nothing, is that of `data.earlier_order`
_BLOCK = 2**15  # pairs that are kept apart together, at least
_FEWEST = 8  # batches of a block: to be apart takes somewhere else to be
_ROUNDS = 24  # of moving pairs that cannot stay
_OFFERS = 8  # places a pair may move to in a round
_LOOKED_AT = 2**16  # pairs of which the plan counts what is left
_KEY = np.int64(2**40)  # above any number of an image or a text


class BatchOrder:
    """Global batches of every epoch as a pure function of (seed, epoch, step); what is held does not grow with the epoch.

    An epoch visits a random permutation, in blocks of some batches. Inside a block a pair whose image or text already stands in its
    batch changes places with one of another batch; what cannot be apart is repeated rather than lost. The last incomplete batch of an
    epoch is left out (another one each epoch), since a smaller batch would have fewer negatives. With `length_window` w > 1, w batches
    at a time are sorted by caption length before they are cut: batches then hold captions of like length, less is padded, and the
    batches of a block are drawn in random order again.

    Of several stores (`table.spans`) an epoch visits each as its weight says (`data.visits`), in batches of all or, `by_store`, of
    one; it is then as long as all visits together.

    Where the pairs have weights (`table.weights`) an epoch visits pictures, each with one caption, drawn by them (`data.captions`).

    With `order_window` pairs are read in runs of neighbours, and shuffled among so many of them (`permutation.InRuns`).

    Pairs of `without_images` (image keys) are passed over. `name` and `key` (of the recipe) are for messages.

    Raises:
        RequestError: the batch is larger than the split, or a store is never visited.
    """

    def __init__(
        self,
        table: PairTable,
        batch_size: int,
        *,
        seed: int,
        length_window: int = 1,
        name: str = "split",
        without_images: AbstractSet[int] = frozenset(),
        key: str = "stages.STAGE",
        by_store: bool = False,
        order_window: int | None = None,
    ) -> None:
        without = np.empty(0, dtype=np.int64)
        if without_images:
            without = np.flatnonzero(np.isin(table.image_keys, list(without_images)))
        spans = table.spans or (Span(name, 0, len(table)),)
        parts = []
        for number, span in enumerate(spans):
            members, one = Members(span.start, span.stop, without), None
            if table.weights is not None:
                mine = members(np.arange(len(members)))
                one = OneCaption(mine, table.image_keys[mine], table.weights[mine], seed, number)
            parts.append(Part(span.name, span.weight, members, one))
        count, what = sum(map(len, parts)), "pairs" if table.weights is None else "pictures, one caption each"
        if batch_size > count:
            raise RequestError(
                f"the batch size ({batch_size}) is larger than {name} ({count} {what}). "
                f"Give {key}.batch_size={count} or less, or add data."
            )
        self.table, self.batch_size, self.seed, self.length_window = table, batch_size, seed, length_window
        self.key = key
        self.visits = Visits(parts, batch_size, seed, by_store=by_store, key=key, window=order_window)
        self.steps_per_epoch = self.visits.steps
        sizes = (
            [count // batch_size for count in self.visits.counts] if self.visits.by_store else [self.steps_per_epoch]
        )
        self._streams = [
            _Stream(self, number if self.visits.by_store else None, size) for number, size in enumerate(sizes)
        ]
        self._turns: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def step(self, step: int) -> np.ndarray:
        """The global batch of a step (of the stage): pair indices int64 ``[batch_size]``, captions from long to short."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if len(self._streams) == 1:
            return self._streams[0].batch(epoch, place)
        stream, number = self._turn(epoch)
        return self._streams[int(stream[place])].batch(epoch, int(number[place]))

    def epoch(self, epoch: int) -> np.ndarray:
        """All batches of an epoch, int64 ``[steps_per_epoch, batch_size]``."""
        first = epoch * self.steps_per_epoch
        return np.stack([self.step(step) for step in range(first, first + self.steps_per_epoch)])

    def _turn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every step of an epoch whose batches are of one store each: the store, and how many of its batches came before."""
        if self._turns[0] != epoch:
            sizes = [stream.steps for stream in self._streams]
            turns = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
            np.random.default_rng([self.seed, epoch]).shuffle(turns)
            number = np.empty_like(turns)
            number[np.argsort(turns, kind="stable")] = np.concatenate([np.arange(size) for size in sizes])
            self._turns = epoch, turns, number
        return self._turns[1], self._turns[2]

    def repeats_per_batch(self) -> float:
        """Mean count of pairs in a batch that share image or text with an earlier one, over the first steps."""
        steps = min(self.steps_per_epoch, max(_LOOKED_AT // self.batch_size, 1))
        batches = np.stack([self.step(step) for step in range(steps)])
        return repeats(*(keys[batches] for keys in self._keys)) / steps

    @property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        return self.table.image_keys, self.table.text_keys

    def expected_repeats(self) -> float:
        """Mean number of other pairs per pair that would share its image or text in a purely random batch of all pairs."""
        n = len(self.table)
        same = sum(float((np.unique(k, return_counts=True)[1] ** 2.0).sum()) - n for k in self._keys)
        return same / n * (self.batch_size - 1) / max(n - 1, 1)


class _Stream:
    """Batches that come one behind the other, in blocks: all of an epoch, or those of a store alone. The last block is held."""

    def __init__(self, order: BatchOrder, number: int | None, steps: int) -> None:
        self.order, self.number, self.steps = order, number, steps
        window = order.length_window
        each = max(_BLOCK // order.batch_size, _FEWEST)
        self._each = max(each // window, 1) * window  # batches of a block: whole windows
        # The last block has its rest, but is not so small that nothing can be moved in it.
        self._blocks = max(round(steps / self._each), 1)
        self._held: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0))

    def batch(self, epoch: int, number: int) -> np.ndarray:
        block = min(number // self._each, self._blocks - 1)
        if self._held[:2] != (epoch, block):
            self._held = epoch, block, self._block(epoch, block)
        batch: np.ndarray = self._held[2][number - block * self._each]
        return batch

    def _block(self, epoch: int, block: int) -> np.ndarray:
        order, size = self.order, self.order.batch_size
        first = block * self._each
        last = self.steps if block == self._blocks - 1 else first + self._each
        places = np.arange(first * size, last * size)
        if self.number is None:
            pairs = order.visits.mixed(epoch, places)
        else:
            pairs = order.visits.of_part(self.number, epoch, places)
        random = np.random.default_rng([order.seed, 0 if self.number is None else self.number, epoch, block])
        if order.length_window > 1:
            lengths, window = lengths_of(pairs, order.table), order.length_window * size
            cuts = range(0, len(pairs), window)
            pairs = np.concatenate([pairs[at + np.argsort(lengths[at : at + window], kind="stable")] for at in cuts])
        pairs = _apart(pairs, size, [keys[pairs] for keys in order._keys], random, near=order.length_window > 1)
        batches = pairs.reshape(-1, size)
        if order.length_window > 1:
            batches = random.permutation(batches)
        return by_length(batches, order.table)


def lengths_of(pairs: np.ndarray, table: PairTable) -> np.ndarray:
    """Tokens of these pairs, int32: what sorts them."""
    return (table.starts[pairs + 1] - table.starts[pairs]).astype(np.int32)


def by_length(batches: np.ndarray, table: PairTable) -> np.ndarray:
    """Each batch with its captions from long to short: shares of it (per device, per micro-batch) pad to their own longest only."""
    lengths = lengths_of(batches, table)
    return np.take_along_axis(batches, np.argsort(-lengths, axis=1, kind="stable"), axis=1)


def _in_batches(keys: np.ndarray) -> np.ndarray:
    """Keys ``[batches, size]`` → numbers ``[batches · size]`` that are equal where the key and the batch are."""
    return (keys + np.arange(len(keys), dtype=np.int64)[:, None] * _KEY).ravel()


def _ordered(numbers: np.ndarray, size: int) -> np.ndarray:
    """Such numbers from small to large: only inside their batches are they not."""
    return np.sort(numbers.reshape(-1, size), axis=1).ravel()


def _repeated(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Places of numbers that stand there before."""
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(twice):
        return twice
    places = np.flatnonzero(_among(numbers, twice))
    found = np.argsort(numbers[places], kind="stable")
    again = numbers[places][found][1:] == numbers[places][found][:-1]
    return np.sort(places[found][1:][again])


def _among(numbers: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each of the numbers is one of `ordered`."""
    at = np.minimum(np.searchsorted(ordered, numbers), len(ordered) - 1)
    found: np.ndarray = ordered[at] == numbers
    return found


def repeats(*keys: np.ndarray) -> int:
    """How many places of batches ``[batches, size]`` have a key, of any kind, that stands in their batch before."""
    found = np.zeros(keys[0].size, bool)
    for numbers in map(_in_batches, keys):
        found[_repeated(numbers, _ordered(numbers, keys[0].shape[1]))] = True
    return int(found.sum())


def _apart(
    pairs: np.ndarray, size: int, keys: list[np.ndarray], random: np.random.Generator, *, near: bool
) -> np.ndarray:
    """Pairs, cut into batches of `size`, with those that repeat a key of their batch changed for pairs of other batches.

    In rounds: each of them is offered some random places (`near`: close by at first), and changes with the first whose pair repeats
    nothing in its batch, nor it in the other's. Two changes of one round may meet: the next round sees to that.
    """
    count, since, best = len(pairs), 0, (len(pairs) + 1, pairs)
    place = np.arange(count)
    for turn in range(_ROUNDS):
        numbers = [_in_batches(key[place].reshape(-1, size)) for key in keys]
        ordered = [_ordered(number, size) for number in numbers]
        wrong = np.union1d(*map(_repeated, numbers, ordered))
        if len(wrong) < best[0]:
            best, since = (len(wrong), place.copy()), turn
        if not len(wrong) or turn - since > _ROUNDS // 4:
            break
        reach = min(count, 2 * size << turn) if near else count
        offers = (wrong[:, None] + random.integers(-reach, reach + 1, (len(wrong), _OFFERS))) % count
        here, there = wrong[:, None] // size, offers // size
        fits = (here != there) & ~_among(offers, wrong)
        for key, held in zip(keys, ordered, strict=True):
            own, theirs = key[place[wrong]][:, None], key[place[offers]]
            fits &= ~_among(own + there * _KEY, held) & ~_among(theirs + here * _KEY, held)
        able = np.flatnonzero(fits.any(1))
        taken, firsts = np.unique(offers[able, fits[able].argmax(1)], return_index=True)
        moved = wrong[able[firsts]]
        place[moved], place[taken] = place[taken], place[moved]
    return pairs[best[1]]


_AHEAD = 4  # batches a worker decodes before they are asked for


class StageSampler(Sampler[list[int]]):
    """This device's share of every global batch from `start` to `stop` (steps of the stage)."""

    def __init__(self, order: BatchOrder, start: int, stop: int, rank: int, world: int) -> None:
        if order.batch_size % world:
            raise RequestError(
                f"the batch size ({order.batch_size}) cannot be shared evenly by {world} devices. "
                f"It is the global batch: give a multiple of {world}, {order.key}.batch_size={max(order.batch_size // world, 1) * world}."
            )
        self.order, self.start, self.stop, self.rank, self.world = order, start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            # Every W-th pair of the batch: each device gets captions of every length.
            yield self.order.step(step)[self.rank :: self.world].tolist()


def make_loader(
    dataset: PairDataset,
    sampler: StageSampler,
    tokenizer: Tokenizer,
    workers: int,
    pin: bool,
    lengths: Sequence[int] = (),
    on_device: OnDevice | None = None,
) -> Batches:
    """Batches of one device, pictures decoded ahead in `workers` processes (0: in this one).

    Args:
        lengths: as `PairTable.batch` has it.
        on_device: decodes what `dataset` hands over as files.
    """
    blocks = None
    if workers and dataset.preprocessing is not None:
        share = sampler.order.batch_size // sampler.world
        # Those a worker may have ready, the one in use, and one more.
        blocks = SharedBlocks(workers * (_AHEAD + 2), share, dataset.preprocessing.shape)
    loader = picture_loader(dataset, sampler, Collate(blocks), workers=workers, pin=pin, ahead=_AHEAD)
    return Batches(loader, partial(dataset.table.batch, tokenizer=tokenizer, lengths=lengths), blocks, pin, on_device)
