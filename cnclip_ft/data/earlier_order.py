"""The order that runs of earlier versions began with: such a run goes on with it, so that it sees what it would have seen.

It walks all pairs of an epoch in Python, and holds them.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from cnclip_ft.data.batching import BatchOrder, by_length
from cnclip_ft.data.visits import Part


class EarlierOrder(BatchOrder):
    """As `BatchOrder`, by one generator an epoch: any step takes its whole epoch."""

    _held = -1, np.empty(0)

    def epoch(self, epoch: int) -> np.ndarray:
        """As `BatchOrder.epoch`."""
        random = np.random.default_rng([self.seed, epoch])
        visits = self.visits
        if not visits.weighted:
            part = visits.parts[0]
            orders = [part.shown(random.permutation(part.units()), epoch)]
        else:
            orders = [self._drawn(number, part, epoch) for number, part in enumerate(visits.parts)]
            if not visits.by_store:
                orders = [random.permutation(np.concatenate(orders))]
        batches = np.concatenate([self._cut(order) for order in orders])
        if self.length_window > 1 or len(orders) > 1:
            batches = batches[random.permutation(self.steps_per_epoch)]
        return by_length(batches, self.table)

    def step(self, step: int) -> np.ndarray:
        """As `BatchOrder.step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._held[0] != epoch:
            self._held = epoch, self.epoch(epoch)
        return self._held[1][place]

    def _drawn(self, number: int, part: Part, epoch: int) -> np.ndarray:
        count, size = part.count, len(part)
        first, begin = divmod(epoch * count, size)
        last = (epoch * count + count - 1) // size
        passes = [
            part.shown(np.random.default_rng([self.seed, each, number + 1]).permutation(part.units()), each)
            for each in range(first, last + 1)
        ]
        return np.concatenate(passes)[begin : begin + count]

    def _cut(self, order: np.ndarray) -> np.ndarray:
        steps, window = len(order) // self.batch_size, self.length_window * self.batch_size
        if self.length_window > 1:
            lengths = self.table.lengths
            parts = np.split(order, range(window, len(order), window))
            order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        return self._apart(order, steps).reshape(steps, self.batch_size)

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
