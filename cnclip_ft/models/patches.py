"""Encoded picture → a block of bytes: its patches in its own shape, within a budget, behind a row that says how many they are.

All blocks have the same size, so that a batch is one block of memory like any other. Patches are laid out as transformers'
Siglip2ImageProcessor does: row by row of the picture, inside a patch row by row, the channels together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image

from cnclip_ft.models.preprocessing import HALF, Resample, stretch, whole_picture
from data_tools.patch_grid import patch_grid
from data_tools.pictures import PIXEL_LIMIT

BUDGET = 256


class Patches(NamedTuple):
    """A batch of pictures: `values` ``[n, budget, patch · patch · 3]``, `grid` int64 ``[n, 2]``, rows and columns of each;
    the first rows × columns patches of a picture are it, the others nothing."""

    values: torch.Tensor
    grid: torch.Tensor


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

    def decode(
        self, source: bytes | memoryview | str | Path | Image.Image, *, reduced: bool = False, pixel_limit: int = PIXEL_LIMIT
    ) -> torch.Tensor:  # fmt: skip
        """One picture as uint8 `shape`. As `SquarePicture.decode`."""
        pixels = whole_picture(source, self.size if reduced else None, pixel_limit)
        rows, columns = patch_grid(*pixels.shape[:2], self.patch, self.budget)
        fitted = stretch(
            torch.from_numpy(pixels).permute(2, 0, 1), rows * self.patch, columns * self.patch, self.resample
        )
        return self.pack(fitted.permute(1, 2, 0).contiguous().numpy())

    def pack(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 ``[rows · patch, columns · patch, 3]`` → uint8 `shape`."""
        rows, columns = (side // self.patch for side in pixels.shape[:2])
        block = torch.zeros(self.shape, dtype=torch.uint8)
        block[0, :4] = torch.tensor([rows % 256, rows // 256, columns % 256, columns // 256], dtype=torch.uint8)
        patches = torch.from_numpy(pixels).view(rows, self.patch, columns, self.patch, 3).transpose(1, 2)
        block[1 : 1 + rows * columns] = patches.reshape(rows * columns, -1)
        return block

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> Patches:
        """uint8 ``[n, *shape]`` → what the tower takes, on the tensor's device."""
        head = pixels[:, 0, :4].long()
        grid = head[:, ::2] + 256 * head[:, 1::2]
        scale, shift = (
            torch.tensor(numbers, device=pixels.device).repeat(self.patch**2)
            for numbers in (
                [1 / (255 * s) for s in self.std],
                [-m / s for m, s in zip(self.mean, self.std, strict=True)],
            )
        )
        return Patches(torch.addcmul(shift, pixels[:, 1:].to(torch.float32), scale).to(dtype), grid)

    @property
    def fitting(self) -> dict[str, Any]:
        return {"patch": self.patch, "budget": self.budget, "resample": self.resample}

    def describe(self) -> dict[str, Any]:
        how = f"aspect kept, at most {self.budget} patches of {self.patch}-{self.resample}"
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std), "input": self.input, "resize": how}

    def record(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "resize": f"aspect kept, at most {self.budget} patches of {self.patch} × {self.patch}, antialiased {self.resample} on uint8",
            "crop": None, "input": self.input, "mean": list(self.mean), "std": list(self.std), "fitting": self.fitting,
        }  # fmt: skip
