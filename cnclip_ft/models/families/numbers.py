"""What the numbers of image and text towers have in common: layers, patches, colours, and positions for another resolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from pydantic import model_validator
from transformers.activations import ACT2FN

from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.schema import Layers, Part, PictureRule, Pixels, Share, Small, TextPart, Vocabulary, Width
from data_tools.errors import RequestError
from data_tools.words import Said


class LayerNumbers(Part):
    """Base of the schema of a tower of transformers' layers, under the names of its configuration."""

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    intermediate_size: Width
    hidden_act: str
    layer_norm_eps: Small

    @model_validator(mode="after")
    def _layers(self) -> LayerNumbers:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be divided by num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act {self.hidden_act[:40]!r} is no activation of transformers, e.g. gelu or quick_gelu"
            )
        return self


class TextNumbers(LayerNumbers, TextPart):
    """Of a text tower, with learnt positions."""

    vocab_size: Vocabulary
    max_position_embeddings: Width

    @property
    def longest(self) -> int:
        return self.max_position_embeddings


class PatchNumbers(LayerNumbers, PictureRule):
    """Of an image tower over patches."""

    patch_size: Pixels
    attention_dropout: Share


class SquareNumbers(PatchNumbers):
    """Of an image tower over the patches of squares of one size."""

    image_size: Pixels

    @model_validator(mode="after")
    def _patches(self) -> SquareNumbers:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        return self


class _OfPictures(Protocol):
    preprocessing: Any


T = TypeVar("T", bound=_OfPictures)


def with_picture_rule(tower: T, numbers: dict[str, Any]) -> T:
    """The tower with the picture rule of a description; what it leaves out is the tower's own."""
    rule = {key: numbers[key] for key in PictureRule.model_fields if numbers.get(key) is not None}
    rule |= {key: tuple(rule[key]) for key in ("mean", "std") if key in rule}
    tower.preprocessing = replace(tower.preprocessing, **rule)
    return tower


def unusual_rule(picture: SquarePicture | PatchedPicture) -> dict[str, Any]:
    """The picture rule for a description, where it is not the usual one of its kind of pictures."""
    usual, rule = type(picture), {}
    for key in ("fit", "resample"):
        if getattr(picture, key, None) != getattr(usual, key, None):
            rule[key] = getattr(picture, key)
    if (picture.mean, picture.std) != (usual.mean, usual.std):
        rule |= {"mean": list(picture.mean), "std": list(picture.std)}
    return rule


def side_of(positions: torch.Tensor) -> int:
    """Patches along a side, of ``[1 + side², width]``."""
    return round((positions.shape[0] - 1) ** 0.5)


def resize_positions(
    numbers: dict[str, Any], tensors: dict[str, torch.Tensor], name: str, step: int, image_size: int
) -> tuple[dict[str, Any], list[str]]:
    """`ImageTower.resized`: position embeddings are interpolated once, bicubically, aligned at the corners.

    That is the rule of the official code (`resize_pos_embed`); transformers' own interpolation at run time is not
    aligned and gives other numbers.

    Args:
        name: the embedding's, ``[1 + side², width]``, the class token's first.
        step: pixels of a patch.
    """
    old = numbers["image_size"]
    if image_size == old:
        return numbers, []
    if image_size % step:
        below = max(image_size // step, 1) * step
        raise RequestError(
            f"image_size {image_size} is no multiple of {step}, the tower's patch size: model.image_size={below} or model.image_size={below + step}"
        )
    positions = tensors[name]
    before, after = side_of(positions), image_size // step
    grid, note = resized_grid(positions[1:], before, after, aligned=True, old=old, new=image_size)
    tensors[name] = torch.cat([positions[:1], grid]).contiguous()
    return numbers | {"image_size": image_size}, [note]


def resized_grid(
    positions: torch.Tensor, before: int, after: int, *, aligned: bool, old: int, new: int
) -> tuple[torch.Tensor, Said]:
    """``[before², width]`` → ``[after², width]``, bicubically, and the note on it.

    Args:
        aligned: the corners stay corners.
        old, new: sides of the pictures, in pixels.
    """
    grid = positions.float().T.reshape(1, -1, before, before)
    grid = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=aligned)
    note = Said(
        "image size {old} → {new}: position embeddings resized {before}×{before} → {after}×{after} (bicubic{corners})",
        "图像边长 {old} → {new}：位置编码由 {before}×{before} 缩放为 {after}×{after}（双三次{corners}）",
        old=old,
        new=new,
        before=before,
        after=after,
        corners=Said(", corners aligned", "，角点对齐") if aligned else "",
    )
    return grid.flatten(2)[0].T.to(positions.dtype), note
