"""Exact scores of many queries against a gallery in bounded memory.

The product of all features is never held. A tile of it is computed in float32, which is fast and wrong by at
most a known bound; whatever that bound leaves open is scored again in float64. So the answer does not depend on
the size of the tiles, the number of threads or the device, and equal vectors get equal scores wherever they lie.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from data_tools.errors import RequestError, UserError

TIE = 1e-12  # float64 scores of unit features closer than this are a tie; float64 itself is wrong by about 1e-16
DEFAULT_MEMORY = "2GiB"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_CPU_TILE = 64 * 2**20  # bytes; larger tiles leave the cache and gain nothing
_ROWS = 1024


def parse_memory(memory: str | int) -> int:
    """``"2GiB"``, ``"512MB"`` or a number of bytes → bytes (units are powers of 1,024).

    Raises:
        RequestError: not a size, or less than 16 MiB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", str(memory), re.IGNORECASE)
    if not found:
        raise RequestError(f"memory is {memory!r}; write a size such as 2GiB or 512MiB")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 16 * 2**20:
        raise RequestError(f"memory is {memory!r}; at least 16MiB are needed")
    return size


def tile_shape(queries: int, gallery: int, memory: int, device: torch.device, extra: int = 3) -> tuple[int, int]:
    """Rows and columns of a tile whose float32 scores, with `extra` more bytes each, stay within half of `memory`."""
    budget = memory // 2 if device.type == "cuda" else min(memory // 2, _CPU_TILE)
    scores = budget // (4 + extra)
    rows = min(max(queries, 1), _ROWS if device.type != "cuda" else 4096)
    columns = max(64, min(scores // rows, -(-gallery // 64) * 64) // 64 * 64)
    return rows, columns


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products stay float32 inside: no TF32, no bfloat16, no autocast. The error bound rests on it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def settle_device(device: torch.device | str | None, features: torch.Tensor) -> torch.device:
    """Where to compute: the wish, or where the features lie; the CPU when a device has no float64."""
    device = torch.device(device) if device is not None else features.device
    return torch.device("cpu") if device.type == "mps" else device


def products(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """float32 ``[q, dim]`` and ``[g, dim]`` → all inner products ``[q, g]``.

    On the CPU by oneDNN, which takes the instructions a processor has; MKL, which torch takes by itself, leaves AVX-512 aside on
    processors that are not Intel's: an AMD EPYC did 106 billion operations a second with one and 250 with the other.
    """
    if (
        queries.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not queries.numel() * gallery.numel()
    ):
        return queries @ gallery.T
    return torch.nn.functional.linear(queries.to_mkldnn(), gallery.to_mkldnn()).to_dense()


class Side:
    """One set of features ``[n, dim]``, read in tiles.

    Args:
        features: float32, float16 or bfloat16; may be a memory-mapped array behind a tensor.

    Raises:
        UserError: a feature is not finite: every comparison with NaN fails, which would look like a perfect rank.
    """

    def __init__(self, features: torch.Tensor, device: torch.device, memory: int, name: str) -> None:
        if features.ndim != 2:
            raise ValueError(f"{name} must be [n, dim], not {list(features.shape)}")
        self.features, self.device = features, device
        if features.device != device and features.numel() * 4 <= memory // 2:
            self.features = features.to(device)
        self.norms = torch.cat(
            [torch.empty(0, device=device)] + [part.norm(dim=1) for _, part in self.tiles(self._step())]
        ).double()
        if not bool(torch.isfinite(self.norms).all()):
            raise UserError(
                f"the {name} features hold NaN or infinity: the model is broken; go back to an earlier checkpoint"
            )
        self.largest = float(self.norms.max()) if len(self) else 0.0

    def __len__(self) -> int:
        return len(self.features)

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    def _step(self) -> int:
        return max(1, 16 * 2**20 // (4 * max(self.dim, 1)))

    def tiles(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Start and float32 ``[<= rows, dim]`` of each tile, on the device."""
        for start in range(0, len(self), rows):
            yield start, self.features[start : start + rows].to(self.device, torch.float32)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """float64 ``[len(index), dim]``."""
        return self.features[index.to(self.features.device)].to(self.device).double()


def exact(queries: Side, gallery: Side, query_index: torch.Tensor, gallery_index: torch.Tensor) -> torch.Tensor:
    """float64 scores of named pairs, some at a time."""
    step = max(1, 2 ** (26 if queries.device.type == "cuda" else 19) // (8 * max(queries.dim, 1)))  # stays in the cache
    parts = [torch.empty(0, dtype=torch.float64, device=queries.device)]
    for q, g in zip(query_index.split(step), gallery_index.split(step), strict=True):
        parts.append((queries.rows(q) * gallery.rows(g)).sum(1))
    return torch.cat(parts)


def error_bound(queries: Side, gallery: Side) -> torch.Tensor:
    """float64 ``[queries]``: how far a float32 score of this query can be from the true one.

    A sum of d products in any order is wrong by at most about d·2⁻²⁴·Σ|xᵢyᵢ| <= d·2⁻²⁴·|x|·|y|.
    """
    return (queries.dim + 4) * 2.0**-24 * 1.02 * queries.norms * gallery.largest
