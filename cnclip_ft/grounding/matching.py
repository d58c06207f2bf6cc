"""What is learnt of boxes: regions and boxes matched one to one, then focal loss, distance of boxes, and their overlap.

OWL-ViT (arXiv 2205.06230, appendix A1) after DETR (arXiv 2005.12872). Every patch of a picture is a region with a box and a score for each phrase
the picture is asked. The Hungarian method finds for every box of the picture its own region, at the least sum of costs::

    cost = class + |b − b'|₁ + (1 − GIoU),   class = mean over the box's phrases of focal(1) − focal(0)

and the loss of a picture is, over its number of boxes, each part with weight 1::

    Σ focal(score, is the region matched with a box of this phrase) + Σ |b − b'|₁ + Σ (1 − GIoU)

Beside the paper's, every patch whose middle lies in a box learns that box (`inside`), the smallest of several: the mean over these patches of
|b − b'|₁ + (1 − GIoU), as one-stage detectors do (FCOS, arXiv 1904.01355). Of a box one region alone is matched; so all that see a thing learn where it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cnclip_ft.grounding.boxes import corners, giou
from data_tools.errors import RequestError

ALPHA, GAMMA = 0.3, 2.0


@dataclass(frozen=True)
class Targets:
    """What pictures hold.

    Attributes:
        boxes: centred ``[n, b, 4]``, padded.
        counts: int64 ``[n]``, boxes of each picture.
        says: bool ``[n, b, k]``, whether a phrase is said of a box.
        asked: bool ``[n, k]``, which phrases a picture is asked; others are padding.
    """

    boxes: torch.Tensor
    counts: torch.Tensor
    says: torch.Tensor
    asked: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """bool ``[n, b]``: no padding."""
        return torch.arange(self.boxes.shape[1], device=self.counts.device) < self.counts[:, None]


class Parts(NamedTuple):
    """Losses of every picture, ``[n]`` each with gradient, over its number of boxes."""

    focal: torch.Tensor
    distance: torch.Tensor
    overlap: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.focal + self.distance + self.overlap


def focal(scores: torch.Tensor, wanted: torch.Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> torch.Tensor:
    """Sigmoid focal loss (arXiv 1708.02002) of every score: ``−α (1 − p)^γ log p`` where `wanted`, ``−(1 − α) p^γ log(1 − p)`` elsewhere."""
    wanted = wanted.to(scores.dtype)
    surely = torch.sigmoid(scores)
    missed = wanted * (1 - surely) + (1 - wanted) * surely
    weight = alpha * wanted + (1 - alpha) * (1 - wanted)
    return weight * missed**gamma * F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")


def costs(scores: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
    """What it costs to match a region with a box, ``[n, p, b]``.

    Args:
        scores: logits ``[n, p, k]``.
        boxes: centred ``[n, p, 4]``.
    """
    gain = focal(scores, torch.ones_like(scores)) - focal(scores, torch.zeros_like(scores))
    says = targets.says.to(scores.dtype)
    named = torch.einsum("npk,nbk->npb", gain, says) / says.sum(-1).clamp(min=1)[:, None]
    distance = torch.cdist(boxes, targets.boxes, p=1)
    overlap = giou(corners(boxes)[:, :, None], corners(targets.boxes)[:, None])
    return named + distance + (1 - overlap)


@torch.no_grad()
def match(scores: torch.Tensor, boxes: torch.Tensor, real: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The region of every box, int64 ``[n, b]``; −1 for padding, and for boxes beyond the number of regions. Waits for the device.

    Args:
        real: bool ``[n, p]``: what fills up pictures of fewer patches is no region.
    """
    assign = hungarian()
    table = costs(scores, boxes, targets).nan_to_num(nan=1e4, posinf=1e4, neginf=-1e4).double().cpu().numpy()
    found = torch.full(targets.boxes.shape[:2], -1, dtype=torch.int64)
    known = real.cpu().numpy()
    for picture, count in enumerate(targets.counts.tolist()):
        regions, own = assign(table[picture, known[picture], :count])
        found[picture, torch.from_numpy(own)] = torch.from_numpy(known[picture].nonzero()[0][regions])
    return found.to(scores.device)


def losses(scores: torch.Tensor, boxes: torch.Tensor, targets: Targets, matched: torch.Tensor) -> Parts:
    """The loss of every picture (module docstring); arguments as for `match`, whose answer `matched` is."""
    own = matched >= 0
    place = matched.clamp(min=0)
    wanted = torch.zeros_like(scores)
    index = place[..., None].expand(-1, -1, scores.shape[2])
    wanted.scatter_reduce_(1, index, (targets.says & own[..., None]).to(scores.dtype), "amax")
    each = focal(scores, wanted) * targets.asked[:, None]
    mine = boxes.gather(1, place[..., None].expand(-1, -1, 4))
    distance = (mine - targets.boxes).abs().sum(-1) * own
    overlap = (1 - giou(corners(mine), corners(targets.boxes))) * own
    count = targets.counts.clamp(min=1).to(scores.dtype)
    return Parts(each.sum((1, 2)) / count, distance.sum(1) / count, overlap.sum(1) / count)


def inside(boxes: torch.Tensor, places: torch.Tensor, real: torch.Tensor, targets: Targets) -> torch.Tensor:
    """What regions whose patch lies on a thing miss of its box, on the mean of these, ``[n]``; 0 where no patch's middle lies in a box.

    Args:
        boxes, places, real: as `models.heads.Regions` has them.
    """
    edges, middle = corners(targets.boxes)[:, None], places[:, :, None, :2]
    there = ((middle > edges[..., :2]) & (middle < edges[..., 2:])).all(-1) & targets.real[:, None] & real[..., None]
    areas = targets.boxes[:, None, :, 2:].prod(-1).expand(there.shape).masked_fill(~there, torch.inf)
    own = targets.boxes.gather(1, areas.argmin(2)[..., None].expand(-1, -1, 4))
    missed = (boxes - own).abs().sum(-1) + 1 - giou(corners(boxes), corners(own))
    some = there.any(2)
    return torch.where(some, missed, 0).sum(1) / some.sum(1).clamp(min=1)


def hungarian() -> Callable[[Any], tuple[Any, Any]]:
    """scipy's `linear_sum_assignment`.

    Raises:
        RequestError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise RequestError(
            "learning boxes needs scipy, which matches regions and boxes: pip install 'cnclip-ft[ground]'"
        ) from None
    return linear_sum_assignment
