"""What the parts of a dual encoder promise: all that rooms above may know of a family of models.

A picture goes encoded file → `Preprocessing.decode` (uint8, in a worker) → `Preprocessing.normalise` (on the device) →
`ImageTower.trunk` → `project`. A caption goes text → `Tokenizer.encode` (ids) → `Tokenizer.pad` (a batch) → `TextTower`.
Features leave the towers as they are; `DualEncoder` makes them unit rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn


class Preprocessing(Protocol):
    """From an encoded picture to what an image tower takes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one decoded picture, e.g. ``(3, 224, 224)``: the same for all, so that batches are one block of memory."""

    @property
    def size(self) -> int:
        """Longest side of what the tower sees, in pixels: no larger picture need be decoded."""

    def decode(self, source: Any, *, reduced: bool = False, pixel_limit: int = ...) -> torch.Tensor:
        """Encoded bytes, a path or a Pillow image → uint8 `shape`, upright RGB.

        Args:
            reduced: a JPEG may be decoded at half of its scale or less, never below `size`: for training, not for evaluation.

        Raises:
            DataFault: it cannot be read or decoded, or is above a limit; nothing else.
        """

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 ``[n, *shape]`` → what `ImageTower.trunk` takes, on the tensor's device."""

    def describe(self) -> dict[str, Any]:
        """All that decides the pixels, as JSON: part of every key of cached features and of every record of scores."""


class Tokenizer(Protocol):
    """From captions to token ids. Picklable: worker processes get a copy."""

    kind: ClassVar[str]
    """Its word in a checkpoint's description."""
    context_length: int
    """Longest text in tokens, special ones included."""
    padding: Literal["longest", "max_length"]
    """What `pad` fills a batch up to. Where pads are attended to, as in SigLIP, only ``max_length`` gives the author's features."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int:
        """What padding is filled with. It may be a real token too: only `mask` says which is which."""

    def prepare(self, text: str) -> str:
        """The text as it is tokenised. Two texts of equal preparation are the same text, no negatives of each other."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, at most `context_length` of them, not padded."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is cut, special ones included."""

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of ids → `input_ids` and `attention_mask`, both int64 ``[n, tokens]``; 1 in the mask is what is attended to."""

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The `attention_mask` of padded ids, from the ids alone: for graphs that are given nothing else. Traceable."""

    def with_context_length(self, context_length: int) -> Tokenizer:
        """The same, for texts of another length."""

    def fingerprint(self) -> str:
        """Hex digest of the vocabulary and the rules: equal ones give equal ids."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's description says of it beside its files, as JSON."""

    def save(self, folder: str | Path) -> None:
        """Write its files, as transformers reads them where it can."""


class Tower(nn.Module, ABC):
    """What both towers promise."""

    kind: ClassVar[str]
    """Its word in a checkpoint's description."""
    output_dim: int
    """Width of what comes out."""

    @property
    @abstractmethod
    def projection(self) -> nn.Module | None:
        """The last map, into the common space, which may train on a frozen trunk; None where pooling and map are one."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Stem first, then layers, the projection (or the pooling) last; every parameter in exactly one.

        What ``last N``, ``first N`` and ``layer_decay`` count.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All it takes besides weights to build it again, as JSON."""

    @abstractmethod
    def set_gradient_checkpointing(self, wanted: bool) -> None:
        """Compute activations anew in the backward, for less memory."""

    def in_projection(self, name: str) -> bool:
        """Whether the parameter of this name (within the tower) belongs to the projection."""
        prefix = next((own for own, module in self.named_modules() if module is self.projection), None)
        return prefix is not None and name.startswith(f"{prefix}.")

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for this parameter: not for biases, norms and embeddings."""
        return parameter.ndim >= 2 and "embedding" not in name


class ImageTower(Tower):
    """Pixels in, features out: a trunk, which a feature cache can stand for, and a projection."""

    preprocessing: Preprocessing

    @abstractmethod
    def trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `Preprocessing.normalise` gives, ``[n, …]`` → ``[n, width]``, before the projection."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """``[n, width]`` → ``[n, output_dim]``."""
        return features if self.projection is None else self.projection(features)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.project(self.trunk(pixels))

    def example(self, count: int) -> torch.Tensor:
        """`count` blank pictures as `Preprocessing.decode` gives them: uint8 ``[count, *shape]`` on the tower's device."""
        device = next(self.parameters()).device
        return torch.zeros(count, *self.preprocessing.shape, dtype=torch.uint8, device=device)


class TextTower(Tower):
    """Token ids in, features out."""

    max_length: int
    """Longest text it has positions for, in tokens."""
    vocab_size: int

    @abstractmethod
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 ``[n, tokens]`` twice, as `Tokenizer.pad` gives them → ``[n, output_dim]``."""

    def example(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` of `count` texts without padding, valid for the tower, on its device."""
        device = next(self.parameters()).device
        ids = torch.full((count, length), min(1000, self.vocab_size - 1), device=device)
        return ids, torch.ones_like(ids)
