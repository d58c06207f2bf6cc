"""The towers as they are written down for other runtimes: pixels or token ids in, unit features out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder


class ImageEncoder(nn.Module):
    """uint8 ``[batch, *preprocessing.shape]`` → unit ``[batch, dim]`` fp32; normalisation is part of it."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.dtype, self.preprocessing = model.dtype, model.image_tower.preprocessing
        self.tower = model.image_tower.graph()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.tower(self.preprocessing.normalise(pixels, self.dtype)).float(), dim=1)


class TextEncoder(nn.Module):
    """int64 ``[batch, tokens]`` as the tokenizer pads → unit ``[batch, dim]`` fp32; the mask is made inside."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.tokenizer = model.text_tower.graph(), model.tokenizer

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.tower(input_ids, self.tokenizer.mask(input_ids)).float(), dim=1)
