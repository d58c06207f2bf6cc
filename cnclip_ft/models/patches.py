"""Encoded picture → a block of bytes: its patches in its own shape, within a budget, behind a row that says how many they are.

All blocks have the same size, so that a batch is one block of memory like any other. Patches are laid out as transformers'
Siglip2ImageProcessor does: row by row of the picture, inside a patch row by row, the channels together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from cnclip_ft.models.preprocessing import (
    CROPS,
    HALF,
    NORMALISED_INSIDE,
    PILLOW_FILTERS,
    Fit,
    PictureSource,
    Resample,
    SquarePicture,
    stretch,
    whole_picture,
)
from cnclip_ft.runtime import to_device
from data_tools.patch_grid import patch_grid
from data_tools.pictures import PIXEL_LIMIT
from data_tools.words import Said

BUDGET = 256


@dataclass(frozen=True)
class PatchedPicture:
    """`models.contract.Preprocessing` of NaFlex towers.

    Args:
        patch: side of a patch in pixels.
        budget: most patches of a picture.
        mean, std: per channel, of values from 0 to 1.
        resample: antialiased, as Pillow does it.
    """

    patch: int = 16
    budget: int = BUDGET
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    resample: Resample = "bilinear"

    input: ClassVar[str] = "normalised"

    @property
    def shape(self) -> tuple[int, ...]:
        """The first row holds rows and columns, two bytes each, the low one first."""
        return 1 + self.budget, 3 * self.patch**2

    @property
    def size(self) -> int:
        """Side of a square within the budget: no picture whose shorter side is longer need be decoded."""
        return math.isqrt(self.budget) * self.patch

    def decode(self, source: PictureSource, *, reduced: bool = False, pixel_limit: int = PIXEL_LIMIT) -> torch.Tensor:
        """One picture as uint8 `shape`. As `SquarePicture.decode`."""
        pixels = whole_picture(source, self.size if reduced else None, pixel_limit)
        rows, columns = patch_grid(pixels.shape[0], pixels.shape[1], self.patch, self.budget)
        fitted = stretch(
            torch.from_numpy(pixels).permute(2, 0, 1), rows * self.patch, columns * self.patch, self.resample
        )
        return self.pack(fitted.permute(1, 2, 0).contiguous().numpy())

    def part(self, width: int, height: int) -> tuple[float, float, float, float]:
        return 0.0, 0.0, 1.0, 1.0

    def pack(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 ``[rows · patch, columns · patch, 3]`` → uint8 `shape`."""
        rows, columns = (side // self.patch for side in pixels.shape[:2])
        block = torch.zeros(self.shape, dtype=torch.uint8)
        block[0, :4] = torch.tensor([rows % 256, rows // 256, columns % 256, columns // 256], dtype=torch.uint8)
        patches = torch.from_numpy(pixels).view(rows, self.patch, columns, self.patch, 3).transpose(1, 2)
        block[1 : 1 + rows * columns] = patches.reshape(rows * columns, -1)
        return block

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 ``[n, *shape]`` → `dtype` of the same shape, on the tensor's device; the first row stays as it is."""
        body = torch.ones(1 + self.budget, 1, device=pixels.device)
        body[0] = 0
        scale = to_device(torch.tensor([1 / (255 * s) for s in self.std]), pixels.device).repeat(self.patch**2)
        shift = to_device(torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)]), pixels.device)
        shift = shift.repeat(self.patch**2)
        return torch.addcmul(body * shift, pixels.to(torch.float32), 1 + body * (scale - 1)).to(dtype)

    @staticmethod
    def unpack(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `decode` or `normalise` gives, ``[n, *shape]`` → patches ``[n, budget, 3 · patch²]``, and int64 ``[n, 2]``: rows
        and columns of each picture, whose first rows × columns patches are it, the others nothing."""
        head = block[:, 0, :4].long()  # bytes: whole numbers in every precision
        return block[:, 1:], (head[:, ::2] + 256 * head[:, 1::2]).clamp(min=1)

    @property
    def in_words(self) -> str:
        return Said(
            "in its own shape, at most {budget} patches of {patch} × {patch} pixels, {resample}",
            "保持原有形状，最多 {budget} 个 {patch} × {patch} 像素的图块，{resample}",
            **self.fitting,
        )

    @property
    def fitting(self) -> dict[str, Any]:
        return {"patch": self.patch, "budget": self.budget, "resample": self.resample}

    def describe(self) -> dict[str, Any]:
        how = f"aspect kept, at most {self.budget} patches of {self.patch}-{self.resample}"
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std), "input": self.input, "resize": how}

    def record(self) -> dict[str, Any]:
        return {
            "size": self.size, "resize": f"{self.in_words}, antialiased on uint8", "crop": None, "input": self.input,
            "mean": list(self.mean), "std": list(self.std), "fitting": self.fitting,
        }  # fmt: skip

    def outside(self) -> dict[str, Any]:
        return {
            "resize": f"aspect kept: the largest scale at which both sides, rounded up to whole patches of {self.patch} pixels, make at "
                      f"most {self.budget} patches; {self.resample}",
            "layout": "first row: rows and columns of patches, two bytes each, the low one first, then zeros; then the patches row by "
                      "row, each with its pixels row by row, RGB together; zeros behind the last one",
            "normalisation": NORMALISED_INSIDE, "mean": list(self.mean), "std": list(self.std), "fitting": self.fitting,
        }  # fmt: skip

    def processor(self) -> dict[str, Any]:
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "processor_class": "Siglip2Processor",
            "do_convert_rgb": True,
            "do_resize": True,
            "patch_size": self.patch,
            "max_num_patches": self.budget,
            "resample": int(PILLOW_FILTERS[self.resample]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def for_transformers(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        patches, grid = self.unpack(self.normalise(pixels))
        mask = torch.arange(self.budget, device=grid.device) < grid.prod(1, keepdim=True)
        return {"pixel_values": patches, "pixel_attention_mask": mask.int(), "spatial_shapes": grid}


def recorded(record: dict[str, Any]) -> SquarePicture | PatchedPicture:
    """The way from a picture to bytes that a `Preprocessing.record` or an ONNX folder's description tells of, for callers that
    have no model; mean and deviation are the model's matter."""
    if "fitting" in record:
        return PatchedPicture(**record["fitting"])
    fit: Fit = next((fit for fit, said in CROPS.items() if said == record.get("crop")), record.get("fit", "squash"))
    return SquarePicture(record["size"], fit, resample="bilinear" if "bilinear" in record["resize"] else "bicubic")
