"""Exact best pictures of a few questions at once, in tiles over the memory-mapped features.

The arithmetic and the promise are those of `evaluation.retrieval.topk`: float32 products with a known error bound,
whatever it leaves open scored again in float64, equal scores in the order of the index. What differs is that the
gallery is prepared once: looking at every norm again would cost as much as the search.
"""

from __future__ import annotations

import torch

from cnclip_ft.evaluation.sweep import TopLooker
from cnclip_ft.evaluation.tiles import Side, full_precision, parse_memory

_SCORES = 64 * 2**20  # bytes of float32 scores at once
_CONVERTED = 16 * 2**20  # bytes of float16 features made float32 at once: they stay in the cache


class _Gallery(Side):
    """A side whose largest norm is known from the index; its single norms are not needed."""

    def __init__(self, features: torch.Tensor, device: torch.device, largest: float) -> None:
        self.features, self.device, self.largest = features, device, largest


class ExactSearch:
    """Over features ``[n, dim]`` float32 or float16, whose largest norm is `largest`."""

    def __init__(
        self, features: torch.Tensor, largest: float, device: torch.device | str = "cpu", memory: str | int = "1GiB"
    ) -> None:
        device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # MPS has no float64
        self.memory = parse_memory(memory)
        if (
            device.type == "cuda"
            and features.numel() * features.element_size() < torch.cuda.mem_get_info(device)[0] * 0.7
        ):
            features = features.to(device)
        self.gallery = _Gallery(features, device, largest)

    def __len__(self) -> int:
        return len(self.gallery)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit float32 ``[q, dim]`` → float32 scores and int64 numbers ``[q, min(k, n)]`` on the CPU, best first."""
        gallery = self.gallery
        with full_precision():
            asking = Side(queries, gallery.device, self.memory, "query")
            top = TopLooker(asking, gallery, k, self.memory)
            tile = asking.features.to(gallery.device, torch.float32)
            for first, part in gallery.tiles(self._width(len(queries))):
                # The long side first: the library reads the gallery once instead of once a question.
                top.see((part @ tile.T).T, 0, first)
            top.finish(0)
        return top.values, top.indices

    def _width(self, queries: int) -> int:
        width = _SCORES // (4 * queries)
        if self.gallery.features.dtype != torch.float32:
            width = min(width, _CONVERTED // (4 * self.gallery.dim))
        return max(1, width)
