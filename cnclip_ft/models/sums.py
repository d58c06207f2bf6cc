"""What tells weights from others: a sum over names and numbers, wherever features or results are kept of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def sum_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> hashlib._Hash:
    """sha256 over names and bytes, in the order of the names; to be told what else decides."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest
