"""The check every export ends with: features read from what was written against those of the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import UserError

# 1e-4 is rounding; 2e-2 leaves room for weights of 8 to 11 significant bits, 1e-1 for products of 8-bit numbers (what
# they cost in recall is for `--verify` to say).
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-2, "int8": 1e-1}
TEXTS = ("一只在雪地里奔跑的狗", "“两个”孩子在踢足球", "a red car", "狗", "杰尼龟 🐢 １２３ " + "很长的句子" * 20)

Reader = Callable[[torch.Tensor, list[str]], tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def difference(model: DualEncoder, read: Reader) -> float:
    """Largest difference of unit fp32 features over drawn pixels and some texts.

    Args:
        read: uint8 pictures ``[n, *preprocessing.shape]`` and texts → unit image and text features as the written files give them,
            ``[n, dim]``, or ``[ways, n, dim]`` where there are several ways to ask them.
    """
    pixels = torch.stack([model.image_tower.preprocessing.decode(picture) for picture in _pictures(model.image_size)])
    image, text = read(pixels, list(TEXTS))
    ours = model.image_features(pixels), model.encode_texts(TEXTS)
    differences = [(a.float() - b).abs().max() for a, b in zip((image, text), ours, strict=True)]
    return torch.stack(differences).max().item()  # not max(): it may pass a NaN over


def _pictures(side: int) -> list[torch.Tensor]:
    """Noise and smooth colours, uint8 ``[3, h, w]``; half of them have the tower's size and are not resized."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    coarse = torch.randint(0, 256, (2, 3, 4, 4), generator=generator).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(torch.uint8)
    return [*noise, *smooth, noise[0][:, : side // 2], smooth[0][:, :, : side // 3 + 1]]


def require(found: float, target: Path, dtype: str) -> None:
    """Raise when unit features moved by more than the tolerance (or are not numbers)."""
    limit = TOLERANCES[dtype]
    if not found <= limit:
        raise UserError(
            f"{target}: the features of the export differ from the source by {found:.2e} (limit {limit:g}); it was not kept"
        )
