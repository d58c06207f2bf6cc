"""Boxes as tensors, shares of the upright picture's width and height: their forms, and how far they lie on each other.

Three forms, numbers last: *stored* ``(x, y, w, h)`` with the upper left corner, *centred* ``(cx, cy, w, h)``, which heads give and
losses compare, *corners* ``(x1, y1, x2, y2)``, in which areas are taken.
"""

from __future__ import annotations

import torch


def centred(stored: torch.Tensor) -> torch.Tensor:
    """``(x, y, w, h)`` → ``(cx, cy, w, h)``, ``[…, 4]``."""
    place, size = stored.split(2, dim=-1)
    return torch.cat([place + size / 2, size], dim=-1)


def stored(centred: torch.Tensor) -> torch.Tensor:
    """``(cx, cy, w, h)`` → ``(x, y, w, h)``, ``[…, 4]``."""
    place, size = centred.split(2, dim=-1)
    return torch.cat([place - size / 2, size], dim=-1)


def corners(centred: torch.Tensor) -> torch.Tensor:
    """``(cx, cy, w, h)`` → ``(x1, y1, x2, y2)``, ``[…, 4]``."""
    place, size = centred.split(2, dim=-1)
    return torch.cat([place - size / 2, place + size / 2], dim=-1)


def area(corners: torch.Tensor) -> torch.Tensor:
    """``[…, 4]`` → ``[…]``; of swapped corners 0."""
    return (corners[..., 2:] - corners[..., :2]).clamp(min=0).prod(-1)


def iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Intersection over union of corners that are broadcast against each other: ``[n, 1, 4]`` and ``[m, 4]`` give ``[n, m]``.

    0 where both have no area.
    """
    shared, union = _shared(one, other)
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def giou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (arXiv 1902.09630) in (−1, 1], broadcast as `iou`: IoU − |C ∖ (A∪B)| / |C|, C the smallest box around both."""
    shared, union = _shared(one, other)
    tiny = torch.finfo(union.dtype).tiny
    around = area(torch.cat([torch.minimum(one, other)[..., :2], torch.maximum(one, other)[..., 2:]], dim=-1))
    return shared / union.clamp(min=tiny) - (around - union) / around.clamp(min=tiny)


def _shared(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Areas of intersection and union."""
    inside = torch.cat([torch.maximum(one, other)[..., :2], torch.minimum(one, other)[..., 2:]], dim=-1)
    shared = area(inside)
    return shared, area(one) + area(other) - shared
