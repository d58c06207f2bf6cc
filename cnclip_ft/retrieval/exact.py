"""Exact best pictures of a few questions at once, over the memory-mapped features.

The promise is that of `retrieval.recall.topk`: quick products with a known error bound, whatever that leaves open
scored again in float64, equal scores in the order of the index. What differs is that the gallery is prepared once:
looking at every norm again would cost as much as the search.

A server may also keep a half-precision copy (`keep_copy`): the search is bound by memory, and the copy is half of it.
It only proposes. What it proposes is scored in float64 from the features themselves, and where its error bound cannot
exclude a picture that was not proposed, the float32 features are asked instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cnclip_ft.retrieval import half
from cnclip_ft.retrieval.scan import CountLooker, TopLooker
from cnclip_ft.retrieval.tiles import TIE, Side, full_precision, parse_memory

COPY_LIMIT = 300_000  # pictures; packing takes 2 s and 100 MB for every 100,000
_COPY_ROWS = 8192
_MORE = 64  # proposals beyond k
_COPY_MOST = 2048  # results; every proposal is gathered in float64
_SCORES = 64 * 2**20  # bytes of float32 scores at once
_CONVERTED = 16 * 2**20  # bytes of float16 features made float32 at once: they stay in the cache


class _Gallery(Side):
    """A side whose largest norm is known from the index; its single norms are not needed."""

    def __init__(self, features: torch.Tensor, device: torch.device, largest: float) -> None:
        self.features, self.device, self.largest = features, device, largest


class _Chosen(_Gallery):
    """Some rows of a gallery, gathered tile by tile."""

    def __init__(self, gallery: _Gallery, rows: torch.Tensor) -> None:
        super().__init__(gallery.features, gallery.device, gallery.largest)
        self.chosen = rows.to(gallery.features.device)

    def __len__(self) -> int:
        return len(self.chosen)

    def tiles(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        rows = min(rows, max(1, _CONVERTED // (4 * self.dim)))
        for start in range(0, len(self), rows):
            part = self.features[self.chosen[start : start + rows]]
            yield start, part.to(self.device, torch.float32)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return super().rows(self.chosen[index.to(self.chosen.device)])


class ExactSearch:
    """Over features ``[n, dim]`` float32 or float16, whose largest norm is `largest`."""

    def __init__(
        self, features: torch.Tensor, largest: float, device: torch.device | str = "cpu", memory: str | int = "1GiB"
    ) -> None:
        device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # MPS has no float64
        self.memory = parse_memory(memory)
        if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] * 0.7:
            features = features.to(device)
        self.gallery = _Gallery(features, device, largest)
        self._copy: list[torch.ScriptObject] = []

    def __len__(self) -> int:
        return len(self.gallery)

    def keep_copy(self) -> bool:
        """Keep a half-precision copy in memory; False where it cannot be had or would be large."""
        if self.gallery.device.type != "cpu" or not 0 < len(self) <= COPY_LIMIT or not half.available():
            return False
        self._copy = [half.pack(part) for _, part in self.gallery.tiles(_COPY_ROWS)]
        return True

    def search_among(self, rows: torch.Tensor, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `search`, among the pictures of these numbers (int64, ascending) alone."""
        with full_precision():
            scores, places = self._by_features(queries, k, _Chosen(self.gallery, rows))
        return scores, rows[places]

    def count(self, queries: torch.Tensor, least: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """int64 ``[q]``: how many pictures have a cosine of at least `least` (float64 ``[q]``), of all or of `rows`."""
        gallery = self.gallery if rows is None else _Chosen(self.gallery, rows)
        with full_precision():
            asking = Side(queries, gallery.device, self.memory, "query")
            counting = CountLooker(asking, gallery, least)
            tile = asking.features.to(gallery.device, torch.float32)
            for first, part in gallery.tiles(self._width(len(queries))):
                counting.look((part @ tile.T).T, 0, first)
            return counting.counts.cpu()

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit float32 ``[q, dim]`` → float32 scores and int64 numbers ``[q, min(k, n)]`` on the CPU, best first."""
        with full_precision():
            if not self._copy or k > _COPY_MOST:
                return self._by_features(queries, k)
            scores, numbers, open_ = self._by_copy(queries, k)
            if len(open_):
                scores[open_], numbers[open_] = self._by_features(queries[open_], k)
            return scores, numbers

    def _by_features(
        self, queries: torch.Tensor, k: int, gallery: _Gallery | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gallery = self.gallery if gallery is None else gallery
        asking = Side(queries, gallery.device, self.memory, "query")
        top = TopLooker(asking, gallery, k, self.memory)
        tile = asking.features.to(gallery.device, torch.float32)
        for first, part in gallery.tiles(self._width(len(queries))):
            # The long side first: the library reads the gallery once instead of once a question.
            top.look((part @ tile.T).T, 0, first)
        top.finish(0)
        return top.values, top.indices

    def _by_copy(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, numbers, and the rows the copy cannot decide."""
        gallery, k = self.gallery, min(k, len(self))
        near = torch.cat([half.product(queries, part) for part in self._copy], 1)
        lowest, proposed = near.topk(min(len(self), k + _MORE), dim=1)
        proposed = proposed.sort(dim=1).values
        wide, norms = queries.double(), queries.double().norm(dim=1)
        found = gallery.rows(proposed.flatten()).view(*proposed.shape, -1)
        scores = (found * wide[:, None]).sum(2)
        # Scores this close are equal, and equal ones keep the order of the index.
        grid = (TIE * norms * gallery.largest).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
        order = (scores / grid).round().sort(dim=1, descending=True, stable=True).indices[:, :k]
        scores, numbers = scores.gather(1, order), proposed.gather(1, order)
        if proposed.shape[1] == len(self):
            return scores.float(), numbers, torch.empty(0, dtype=torch.int64)
        # A value rounded to half precision is wrong by 2⁻¹¹ of itself, or below 2⁻¹⁴ by 2⁻²⁵; float32 sums add theirs.
        dim = gallery.dim
        error = norms * (gallery.largest * (2.0**-11 + (dim + 4) * 2.0**-23) + dim**0.5 * 2.0**-25)
        open_ = (lowest[:, -1].double() + error >= scores[:, -1] - grid[:, 0]).nonzero()[:, 0]
        return scores.float(), numbers, open_

    def _width(self, queries: int) -> int:
        width = _SCORES // (4 * queries)
        if self.gallery.features.dtype != torch.float32:
            width = min(width, _CONVERTED // (4 * self.gallery.dim))
        return max(1, width)
