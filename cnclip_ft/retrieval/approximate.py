"""Approximate search with faiss for many millions of pictures: HNSW or IVF, measured against exact search when built.

faiss keeps half-precision copies and proposes; the proposals are scored again from the index's own features, so a
score is a true cosine and only a picture's absence can be wrong.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnclip_ft.retrieval.exact import ExactSearch
from data_tools.bars import Bar
from data_tools.errors import RequestError

KINDS = ("hnsw", "ivf")
MISSING = "approximate search needs faiss: pip install 'cnclip-ft[faiss]'"
_TARGET, _AT, _ASKED = 0.95, 10, 256  # recall@_AT wanted, over so many of the index's own pictures
_LINKS, _CARE = 32, 128  # of an HNSW graph
_MOST_EFFORT = 2048
_BLOCK = 65536


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def require_faiss() -> Any:
    """The module.

    Raises:
        RequestError: it is not installed.
    """
    if not has_faiss():
        raise RequestError(MISSING)
    import faiss

    return faiss


class ApproximateSearch:
    """A faiss index over features ``[n, dim]``, which stay where they are and settle the order."""

    def __init__(self, index: Any, features: np.ndarray, about: dict[str, Any]) -> None:
        self.index, self.features, self.about = index, features, about

    def __len__(self) -> int:
        return len(self.features)

    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ExactSearch.search`; where faiss proposes fewer than k, the last scores are −inf and numbers −1."""
        k = min(k, len(self))
        wide = np.ascontiguousarray(queries.numpy(), np.float32)
        _, numbers = self.index.search(wide, min(len(self), k + max(k, 16)), params=self._parameters(k))
        numbers = np.sort(numbers, axis=1)  # equal scores in the order of the index
        found = self.features[np.maximum(numbers, 0)].astype(np.float64)
        scores = np.einsum("qkd,qd->qk", found, wide.astype(np.float64))
        scores[numbers < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
        return torch.from_numpy(best[0]).float(), torch.from_numpy(best[1])

    def _parameters(self, k: int) -> Any:
        import faiss  # the classes its own annotations leave out or misname stand on the module all the same

        library: Any = faiss
        effort = self.about["effort"]
        if self.about["kind"] == "hnsw":
            return library.SearchParametersHNSW(efSearch=max(effort, 2 * k + 16))
        return library.SearchParametersIVF(nprobe=effort)

    def write(self, path: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(path))


def read(path: Path, features: np.ndarray, about: dict[str, Any]) -> ApproximateSearch:
    """What `build` wrote.

    Raises:
        RequestError: faiss is missing, or the file is damaged.
    """
    faiss = require_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise RequestError(f"{path} cannot be read ({str(error)[:120]}); make the index anew with --rebuild") from None
    if (index.ntotal, index.d) != features.shape:
        raise RequestError(
            f"{path} is of other features ({index.ntotal:,} × {index.d}); make the index anew with --rebuild"
        )
    return ApproximateSearch(index, features, about)


def build(
    features: np.ndarray, kind: str, largest: float, say: Callable[[str], None] = print, seed: int = 0
) -> ApproximateSearch:
    """Build over ``[n, dim]``, then raise the effort of a search until recall@10 against exact search reaches 0.95.

    Asked are pictures of the index for their neighbours, themselves left out.
    """
    faiss = require_faiss()
    count, dim = features.shape
    random = np.random.default_rng(seed)
    if kind == "hnsw":
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _CARE
        efforts = [2**n for n in range(5, 12)]
        index.train(np.ascontiguousarray(features[:1], np.float32))
    else:
        # faiss wants 39 vectors a cell to place it well; 4·√n cells balance finding the cell and walking it.
        cells = max(1, min(int(4 * math.sqrt(count)), count // 39))
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dim), dim, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        efforts = [2**n for n in range(12) if 2**n < cells] + [cells]
        sample = np.sort(random.choice(count, min(count, 128 * cells), replace=False))
        index.train(np.ascontiguousarray(features[sample], np.float32))
    with Bar(total=count, desc=kind, unit=" pictures") as bar:
        for start in range(0, count, _BLOCK):
            block = np.ascontiguousarray(features[start : start + _BLOCK], np.float32)
            index.add(block)
            bar.update(len(block))
    found = ApproximateSearch(index, features, {"kind": kind})
    asked = np.sort(random.choice(count, min(count, _ASKED), replace=False))
    truth = neighbours(ExactSearch(torch.from_numpy(np.asarray(features)), largest), features, asked)
    recall = 0.0
    for effort in efforts:
        found.about["effort"] = effort
        recall = _recall(neighbours(found, features, asked), truth)
        if recall >= _TARGET or effort >= _MOST_EFFORT:
            break
    found.about |= {"recall_at_10": recall, "asked": len(asked)}
    word = "efSearch" if kind == "hnsw" else f"nprobe of {index.nlist} cells"
    say(f"{kind}: recall@{_AT} {recall:.3f} against exact search, {len(asked)} pictures asked ({word} {effort})")
    return found


def neighbours(search: Any, features: np.ndarray, asked: np.ndarray) -> list[set[int]]:
    """The ten nearest of some pictures of the index, themselves left out."""
    queries = torch.from_numpy(np.ascontiguousarray(features[asked], np.float32))
    found = []
    for part, own in zip(queries.split(64), np.split(asked, range(64, len(asked), 64)), strict=True):
        _, numbers = search.search(part, _AT + 1)
        for row, number in zip(numbers.tolist(), own.tolist(), strict=True):
            found.append(set([other for other in row if other != number][:_AT]))
    return found


def _recall(found: list[set[int]], truth: list[set[int]]) -> float:
    wanted = sum(map(len, truth))
    return sum(len(a & b) for a, b in zip(found, truth, strict=True)) / wanted if wanted else 1.0
