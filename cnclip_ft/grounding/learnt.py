"""Boxes for phrases off learnt heads: the best regions of a phrase, each thing once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cnclip_ft.grounding.boxes import corners, iou
from cnclip_ft.grounding.heat import Box, Region
from cnclip_ft.grounding.metrics import enclosing
from cnclip_ft.models.heads import Regions

MOST = 50  # regions of a phrase that are looked at
SHARE = 0.5  # of the best probability, from which on boxes are those of a phrase of several things
SAME = 0.7  # overlap from which on two regions are of one thing: the better one stays


class Detections(NamedTuple):
    """Boxes of one phrase in one picture, the best first.

    Attributes:
        boxes: corners ``[m, 4]``, float32 on the CPU, inside the picture.
        scores: probabilities ``[m]``.
    """

    boxes: torch.Tensor
    scores: torch.Tensor


def detect(regions: Regions, phrases: torch.Tensor, most: int = MOST, same: float = SAME) -> list[list[Detections]]:
    """What is found of phrases in pictures: for every picture a list over its phrases.

    Args:
        phrases: unit features, ``[k, dim]`` for all pictures or ``[n, k, dim]``.
        most: regions of a phrase that are looked at.
        same: boxes that lie on a better one by more than this IoU are left out.
    """
    scores = torch.sigmoid(regions.scores(phrases.to(regions.features.dtype)))
    scores = scores.masked_fill(~regions.real[..., None], -1.0)  # behind the least probable region
    best, place = scores.transpose(1, 2).topk(min(most, scores.shape[1]), dim=2)
    boxes = corners(regions.boxes).clamp(0, 1)
    picture = torch.arange(len(boxes), device=boxes.device)[:, None, None]
    chosen, best = boxes[picture, place].float().cpu(), best.float().cpu()
    kept = _apart(chosen, same) & regions.real[picture, place].cpu()
    return [
        [Detections(boxes[keep], own[keep]) for boxes, own, keep in zip(*one, strict=True)]
        for one in zip(chosen, best, kept, strict=True)
    ]


def _apart(boxes: torch.Tensor, same: float) -> torch.Tensor:
    """Which boxes ``[…, m, 4]``, the best first, are not of a thing that a better one is of: bool ``[…, m]``."""
    overlaps = iou(boxes[..., :, None, :], boxes[..., None, :, :]) > same
    kept = torch.ones(boxes.shape[:-1], dtype=torch.bool)
    for number in range(boxes.shape[-2] - 1):
        kept[..., number + 1 :] &= ~(kept[..., number, None] & overlaps[..., number, number + 1 :])
    return kept


def in_picture(found: Detections, part: Box) -> list[Region]:
    """The same in shares of the upright picture; `part` is what of it the tower sees (`Preprocessing.part`)."""
    x, y, width, height = part
    return [
        Region((x + left * width, y + top * height, (right - left) * width, (bottom - top) * height), score)
        for (left, top, right, bottom), score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True)
    ]


def merged(found: list[Region]) -> list[Region]:
    """Candidates for the one box around all things of a phrase: first what encloses the boxes with at least `SHARE` of the best
    probability, then the boxes as they are."""
    if not found:
        return []
    several = [region.box for region in found if region.score >= SHARE * found[0].score]
    x, y, width, height = enclosing(np.array(several, np.float64))[0].tolist()
    return [Region((x, y, width, height), found[0].score), *found]
