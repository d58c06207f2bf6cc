"""What image towers give of single patches: features in the common space, and plain tokens for learnt heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from data_tools.errors import RequestError

METHODS = ("maskclip", "sclip", "naclip")
"""Ways to change the last block of a ViT, so that a patch's feature tells of the patch and not of the picture:

* ``maskclip`` (arXiv 2112.01071): the value path alone; neither attention nor the rest of the block.
* ``sclip`` (arXiv 2312.01597): attention where queries are alike, and where keys are alike, added; the rest as it is.
* ``naclip`` (arXiv 2404.08181): attention where keys are alike, and near: a Gaussian of the distance between patches is added to
  the scores; without residual and feed-forward.
"""
OWN = "own"
"""A tower's own map of features, of which nothing is changed."""
_NEAR = 5.0  # standard deviation of the Gaussian in patches, as the authors have it


class Patches(NamedTuple):
    """
    Args:
        features: ``[n, patches, width]``, row by row of each picture; beyond a picture's own patches there is nothing to read.
        grid: int64 ``[n, 2]``, rows and columns of each picture.
        seen: share of the height and of the width of what the tower is given that the grid covers, from the upper left corner: less
            than 1 where its side is no multiple of the patch's.
    """

    features: torch.Tensor
    grid: torch.Tensor
    seen: tuple[float, float] = (1.0, 1.0)


class Tokens(NamedTuple):
    """
    Args:
        patches: ``[n, patches, width]`` of the whole last block, behind its norm; as in `Patches`.
        pooled: ``[n, width]``, what `ImageTower.trunk` gives.
        grid, seen: as in `Patches`.
    """

    patches: torch.Tensor
    pooled: torch.Tensor
    grid: torch.Tensor
    seen: tuple[float, float] = (1.0, 1.0)


class HasPatches:
    """The part of an image tower's contract that not every tower keeps: one that names `patch_methods` has both methods."""

    kind: ClassVar[str]

    @property
    def patch_methods(self) -> tuple[str, ...]:
        """What `patches` can be asked for (`METHODS`, `OWN`); () where the tower has no features of single patches."""
        return ()

    def check_patches(self, method: str | None = None) -> None:
        """Ask whether there are `patches` by this method, or by any, before anything is read.

        Raises:
            RequestError: there are none.
        """
        if not self.patch_methods:
            raise self._without_patches()
        if method is not None and method not in self.patch_methods:
            raise RequestError(
                f"method {method!r}: an image tower of kind {self.kind} knows {', '.join(self.patch_methods)}"
            )

    def _without_patches(self) -> RequestError:
        return RequestError(
            f"an image tower of kind {self.kind} gives no features of single patches, so nothing can be found in a picture with it. "
            "Take a checkpoint whose image tower is a ViT; a tower by import path needs a method patches (docs/towers.md#your-own-image-tower-by-import-path)"
        )

    def patches(self, pixels: torch.Tensor, method: str) -> Patches:
        """What `Preprocessing.normalise` gives, ``[n, …]`` → features of patches, ``[n, patches, output_dim]``.

        Raises:
            RequestError: as `check_patches`.
        """
        raise self._without_patches()

    def tokens(self, pixels: torch.Tensor) -> Tokens:
        """What `Preprocessing.normalise` gives → tokens of patches before any projection, and `trunk`, in one walk, with gradient.

        No patch is dropped, whatever `patch_dropout` says.

        Raises:
            RequestError: as `check_patches`.
        """
        raise self._without_patches()


Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LastBlock:
    """A pre-norm block by its parts.

    Args:
        norm: before attention.
        query, key, value: of normed tokens, ``[n, tokens, width]`` → the same shape.
        out: of what attention gives, without the residual.
        rest: ``[n, tokens, width]`` → the same: feed-forward with its norm and residual.
    """

    norm: Map
    query: Map
    key: Map
    value: Map
    out: Map
    rest: Map
    heads: int


def of_transformers(layer: Any) -> LastBlock:
    """Of a layer built as CLIP's and SigLIP's in transformers."""
    own = layer.self_attn
    return LastBlock(
        layer.layer_norm1,
        own.q_proj,
        own.k_proj,
        own.v_proj,
        own.out_proj,
        lambda hidden: hidden + layer.mlp(layer.layer_norm2(hidden)),
        own.num_heads,
    )


def changed(
    block: LastBlock,
    hidden: torch.Tensor,
    method: str,
    grid: torch.Tensor,
    *,
    prefix: int = 0,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the last block gives of the patches by one of `METHODS`.

    Args:
        hidden: ``[n, prefix + patches, width]`` before the block; `prefix` tokens are none of patches.
        grid: int64 ``[n, 2]`` or ``[1, 2]``, rows and columns.
        real: bool ``[n, patches]``, false for padding; needs a prefix of 0.

    Returns:
        ``[n, patches, width]``.
    """
    if method == "maskclip":
        return block.out(block.value(block.norm(hidden[:, prefix:])))
    normed = block.norm(hidden)
    key, value = _heads(block.key(normed), block.heads), _heads(block.value(normed), block.heads)
    mask = None if real is None else real[:, None, None]
    if method == "naclip":
        near = F.pad(_nearness(grid, hidden.shape[1] - prefix), (prefix, 0))[:, None].to(key.dtype)
        if mask is not None:
            near = near.masked_fill(~mask, -torch.inf)
        return block.out(_alike(key, value, prefix, near))
    query = _heads(block.query(normed), block.heads)
    mixed = _alike(query, value, prefix, mask) + _alike(key, value, prefix, mask)
    return block.rest(hidden[:, prefix:] + block.out(mixed))


def _heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """``[n, tokens, width]`` → ``[n, heads, tokens, width of one]``."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def _alike(look: torch.Tensor, value: torch.Tensor, prefix: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Values of the tokens that are alike, for every patch: ``[n, patches, width]``."""
    mixed = F.scaled_dot_product_attention(look[:, :, prefix:], look, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def _nearness(grid: torch.Tensor, count: int) -> torch.Tensor:
    """``[n, patches, patches]``: 1 for a patch and itself, less with the distance."""
    place, columns = torch.arange(count, device=grid.device), grid[:, 1:]
    where = torch.stack([place // columns, place % columns], 2).float()
    # Not `torch.cdist`, whose way over products is not exact for equal places.
    apart = (where[:, :, None] - where[:, None]).square().sum(3)
    return torch.exp(-apart / (2 * _NEAR**2))
