"""The order of the pairs: random, without repeated images or texts in a batch where that can be had, and
known for every step in advance, so that a run can be continued at any step without replaying the ones before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import numpy as np
from torch.utils.data import Sampler

from cnclip_ft.data.captions import OneCaption
from cnclip_ft.data.device_decoding import OnDevice
from cnclip_ft.data.pairs import PairDataset, PairTable
from cnclip_ft.data.pictures import picture_loader
from cnclip_ft.data.transport import Batches, Collate, SharedBlocks
from cnclip_ft.data.visits import Visits
from cnclip_ft.models.contract import Tokenizer
from data_tools.errors import RequestError


class BatchOrder:
    """Global batches of every epoch as a pure function of (seed, epoch).

    An epoch visits a random permutation; a pair whose image or text already stands in the batch waits for the next
    one. The last incomplete batch of an epoch is left out (another one each epoch), since a smaller batch would have
    fewer negatives. With `length_window` w > 1, w batches at a time are sorted by caption length before they are cut:
    batches then hold captions of like length, less is padded, and batches are drawn in random order again.

    Of several stores (`table.spans`) an epoch visits each as its weight says (`data.visits`), in batches of all or, `by_store`, of
    one; it is then as long as all visits together.

    Where the pairs have weights (`table.weights`) an epoch visits pictures, each with one caption, drawn by them (`data.captions`).

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
    ) -> None:
        self.pairs = np.arange(len(table))
        if without_images:
            self.pairs = self.pairs[~np.isin(table.image_keys, list(without_images))]
        spans = [self.pairs[(self.pairs >= span.start) & (self.pairs < span.stop)] for span in table.spans]
        self.one: list[OneCaption] = []
        if table.weights is not None:
            self.one = [
                OneCaption(mine, table.image_keys[mine], table.weights[mine], seed, part)
                for part, mine in enumerate(spans or [self.pairs])
            ]
        held = [one.units for one in self.one] or spans or [self.pairs]
        count, what = sum(map(len, held)), "pictures, one caption each" if self.one else "pairs"
        if batch_size > count:
            raise RequestError(
                f"the batch size ({batch_size}) is larger than {name} ({count} {what}). "
                f"Give {key}.batch_size={count} or less, or add data."
            )
        self.table, self.batch_size, self.seed, self.length_window = table, batch_size, seed, length_window
        self.key = key
        self.steps_per_epoch = count // batch_size
        # Without repetition there is nothing to keep apart, and the permutation can be cut as it is.
        images = () if self.one and len(self.one) == 1 else (table.image_keys,)
        self._repeats = any(len(np.unique(keys)) < len(keys) for keys in (*images, table.text_keys))
        self.visits: Visits | None = None
        if len(table.spans) > 1 or any(span.weight != 1 for span in table.spans):
            self.visits = Visits(table.spans, held, batch_size, seed, by_store=by_store, key=key, one=self.one)
            self.steps_per_epoch, self._repeats = self.visits.steps, self._repeats or self.visits.repeats

    def epoch(self, epoch: int) -> np.ndarray:
        """Pair indices int64 ``[steps_per_epoch, batch_size]``; in each row captions run from long to short."""
        random = np.random.default_rng([self.seed, epoch])
        lengths = self.table.lengths
        if self.visits is not None:
            orders = self.visits.epoch(epoch, random)
        elif self.one:
            orders = [self.one[0].draw(random.permutation(self.one[0].units), epoch)]
        else:
            orders = [random.permutation(self.pairs)]
        batches = np.concatenate([self._cut_apart(order, lengths) for order in orders])
        if self.length_window > 1 or len(orders) > 1:
            batches = batches[random.permutation(self.steps_per_epoch)]
        # Sorted inside the batch: shares of it (per device, per micro-batch) pad to their own longest only.
        return np.take_along_axis(batches, np.argsort(-lengths[batches], axis=1, kind="stable"), axis=1)

    def _cut_apart(self, order: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pairs in the order drawn → batches ``[steps, batch_size]``; what does not fill a last one is left out."""
        steps, window = len(order) // self.batch_size, self.length_window * self.batch_size
        if self.length_window > 1:
            order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in _cut(order, window)])
        batches = self._apart(order, steps) if self._repeats else order
        return batches[: steps * self.batch_size].reshape(steps, self.batch_size)

    def _apart(self, order: np.ndarray, steps: int) -> np.ndarray:
        """Cut into `steps` batches without repeated keys, moving a pair to a later batch where its key is taken."""
        images, texts = self.table.image_keys[order].tolist(), self.table.text_keys[order].tolist()
        coming = iter(range(len(order)))
        waiting: deque[int] = deque()
        placed: list[int] = []
        for _ in range(steps):
            seen_images: set[int] = set()
            seen_texts: set[int] = set()
            size, again = 0, len(waiting)
            while size < self.batch_size:
                if again > 0:
                    again -= 1
                    position = waiting.popleft()
                else:
                    position = next(coming, -1)
                    if position < 0:
                        break
                if images[position] in seen_images or texts[position] in seen_texts:
                    waiting.append(position)
                    continue
                seen_images.add(images[position])
                seen_texts.add(texts[position])
                placed.append(position)
                size += 1
            for _ in range(self.batch_size - size):  # nothing apart is left: repeat rather than lose pairs
                placed.append(waiting.popleft())
        return order[placed]

    def repeats_per_batch(self) -> float:
        """Mean count of pairs in a batch that share image or text with an earlier one, over the first epoch."""
        count = 0
        for batch in self.epoch(0):
            images, texts = self.table.image_keys[batch], self.table.text_keys[batch]
            count += max(2 * len(batch) - len(np.unique(images)) - len(np.unique(texts)), 0)
        return count / self.steps_per_epoch

    def expected_repeats(self) -> float:
        """Mean number of other pairs per pair that would share its image or text in a purely random batch of all pairs."""
        n = len(self.table)
        keys = (self.table.image_keys, self.table.text_keys)
        same = sum(float((np.unique(k, return_counts=True)[1] ** 2.0).sum()) - n for k in keys)
        return same / n * (self.batch_size - 1) / max(n - 1, 1)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(order, range(size, len(order), size))


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
        steps, epoch, batches = self.order.steps_per_epoch, -1, np.empty(0)
        for step in range(self.start, self.stop):
            if step // steps != epoch:
                epoch = step // steps
                batches = self.order.epoch(epoch)
            # Every W-th pair of the batch: each device gets captions of every length.
            yield batches[step % steps][self.rank :: self.world].tolist()


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
