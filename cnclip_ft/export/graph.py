"""The towers as they are written down for other runtimes: pixels or token ids in, unit features out, and what lies between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder

# Input and outputs of each, by name; what follows the unit features is cut off again unless somebody's layout begins or ends there.
INPUTS = {"image": "pixels", "text": "input_ids"}
OUTPUT = "features"
BETWEEN = {"image": ("image_embeds", "pixel_values"), "text": ("text_embeds", "attention_mask")}


class ImageEncoder(nn.Module):
    """uint8 ``[batch, *preprocessing.shape]`` → unit ``[batch, dim]`` fp32; the same before it was made unit; what the tower was
    given, fp32 where it is normalised."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.dtype, self.preprocessing = model.dtype, model.image_tower.preprocessing
        self.tower = model.image_tower.graph()

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = self.preprocessing.normalise(pixels)
        features = self.tower(values.to(self.dtype) if values.is_floating_point() else values).float()
        return F.normalize(features, dim=1), features, values


class TextEncoder(nn.Module):
    """int64 ``[batch, tokens]`` as the tokenizer pads → unit ``[batch, dim]`` fp32; the same before it was made unit; the mask,
    int64 ``[batch, tokens]``."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.tower, self.tokenizer = model.text_tower.graph(), model.tokenizer

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = self.tokenizer.mask(input_ids)
        features = self.tower(input_ids, mask).float()
        return F.normalize(features, dim=1), features, mask
