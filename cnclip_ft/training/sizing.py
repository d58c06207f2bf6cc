"""`data.workers: auto`: how many processes must decode so that the towers never wait, by what the first steps of a stage show.

A worker says how long it took for a batch, the training process how long it took for a step when its batch was there. Batches are
a function of the step alone (`data.batching`), so a loader with more workers goes on where the one before was.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from data_tools.words import Said

_PASSED_OVER = 3  # first steps: kernels are chosen, graphs compiled, the loader's pages touched
_MEASURED = 8
_SPARE = 1.25  # pictures differ, and a worker that is done early costs nothing


@dataclass
class Sizing:
    """What the first steps show; `workers` decode now, `most` there may be.

    `at_rest` says that it knows enough.
    """

    workers: int
    most: int
    pairs: int  # of a step on this device
    _seconds: list[tuple[float, float]] = field(default_factory=list)  # of a worker for a batch, of a step

    @property
    def at_rest(self) -> bool:
        return len(self._seconds) >= _PASSED_OVER + _MEASURED

    def add(self, of_worker: float, of_step: float) -> None:
        """Seconds a worker took for a batch, and the step that followed, waiting for the batch left out."""
        self._seconds.append((of_worker, of_step))

    def _medians(self) -> tuple[float, float]:
        made, taken = zip(*self._seconds[_PASSED_OVER:], strict=True)
        return max(statistics.median(made), 1e-9), max(statistics.median(taken), 1e-9)

    @property
    def needed(self) -> int:
        """Workers that are as fast as the steps."""
        made, taken = self._medians()
        return max(1, -int(-_SPARE * made // taken))

    @property
    def chosen(self) -> int:
        """Never fewer than there are: one without work costs next to nothing."""
        return min(max(self.needed, self.workers), max(self.most, self.workers))

    @property
    def bound(self) -> bool:
        """Whether the loader stays slower than the steps."""
        made, taken = self._medians()
        return self.chosen * taken < made

    def numbers(self) -> dict[str, float | int | bool]:
        """For the journal."""
        made, taken = self._medians()
        return {
            "workers": self.chosen,
            "workers_before": self.workers,
            "pictures_per_worker": self.pairs / made,
            "pairs_of_steps": self.pairs / taken,
            "loader_is_the_bound": self.bound,
        }

    def said(self) -> Said:
        """The same in words, with the way out where the loader is too slow."""
        found = self.numbers()
        told = Said(
            "data.workers: auto → {chosen}: one decodes {one:,.0f} pictures a second, the steps take {steps:,.0f}",
            "data.workers: auto → {chosen}：一个进程每秒解码 {one:,.0f} 张图片，训练步每秒需要 {steps:,.0f} 张",
            chosen=self.chosen,
            one=found["pictures_per_worker"],
            steps=found["pairs_of_steps"],
        )
        if not self.bound:
            return told
        return Said(
            "{told}. The loader is the bound: {needed} would be needed, and there are cores for {chosen}. Pictures stored smaller are "
            "decoded faster (`--max-side` of `cnclip-ft data build`); on a card data.decode=device",
            "{told}。加载器是瓶颈：需要 {needed} 个进程，而核只够 {chosen} 个。存得更小的图片解码更快（`cnclip-ft data build` 的 "
            "`--max-side`）；在显卡上可用 data.decode=device",
            told=told,
            needed=self.needed,
            chosen=self.chosen,
        )
