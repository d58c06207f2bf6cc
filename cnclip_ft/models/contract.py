"""What the parts of a dual encoder promise: all that rooms above may know of a family of models.

A picture goes encoded file → `Preprocessing.decode` (uint8, in a worker) → `Preprocessing.normalise` (on the device) →
`ImageTower.trunk` → `project`. A caption goes text → `Tokenizer.encode` (ids) → `Tokenizer.pad` (a batch) → `TextTower`.
Features leave the towers as they are; `DualEncoder` makes them unit rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import nn

from cnclip_ft.models.dense import HasPatches
from cnclip_ft.models.schema import Part, TextPart
from data_tools.errors import RequestError


class Preprocessing(Protocol):
    """From an encoded picture to what an image tower takes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one decoded picture, e.g. ``(3, 224, 224)``: the same for all, so that batches are one block of memory.

        Three numbers are channels, rows and columns, and the channels lie together in memory. What is no picture of one size,
        as patches in their own shape, is packed into bytes (`models.patches`).
        """

    @property
    def size(self) -> int:
        """Side of the square the tower sees, in pixels (of as many as it may see, where it is none): no picture whose shorter
        side is longer need be decoded."""

    def decode(self, source: Any, *, reduced: bool = False, pixel_limit: int = ...) -> torch.Tensor:
        """Encoded bytes, a path, a Pillow image or uint8 pixels → uint8 `shape`, upright RGB.

        Args:
            reduced: a JPEG may be decoded at half of its scale or less, never below `size`: for training, not for evaluation.

        Raises:
            DataFault: it cannot be read or decoded, or is above a limit; nothing else.
        """

    def normalise(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """uint8 ``[n, *shape]`` → what `ImageTower.trunk` takes, on the tensor's device, in memory as the pixels lie."""

    def describe(self) -> dict[str, Any]:
        """All that decides the pixels, as JSON: part of every key of cached features."""

    def record(self) -> dict[str, Any]:
        """The same for records of scores; `models.patches.recorded` makes the way to bytes of it again."""

    def outside(self) -> dict[str, Any]:
        """For who has the graph alone, as JSON: how the bytes it takes are made of a picture."""

    @property
    def in_words(self) -> str:
        """For the plan of a run."""

    @property
    def fitting(self) -> dict[str, Any]:
        """As JSON, what it takes to bring an upright picture to the pixels that `pack` takes (`search.web.decoder`)."""

    def part(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What is seen of an upright picture of this size: ``(x, y, width, height)`` in shares of it, x and y the upper left corner."""

    def pack(self, pixels: Any) -> torch.Tensor:
        """uint8 numpy ``[h, w, 3]`` of a fitted picture → uint8 `shape`."""

    def processor(self) -> dict[str, Any]:
        """``preprocessor_config.json`` of transformers, the names of classes apart unless there is one alone."""

    def for_transformers(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 ``[n, *shape]`` → what the call ``get_image_features`` of transformers' model takes."""


class Tokenizer(ABC):
    """From captions to token ids. Picklable: worker processes get a copy."""

    kind: ClassVar[str]
    """Its word in a checkpoint's description."""
    schema: ClassVar[type[Part]]
    """What `describe` gives, for checking what a file says."""
    preparation: ClassVar[str]
    """What is done to a text, in words, for records of scores."""
    padding: Literal["longest", "max_length"] = "longest"
    """What `pad` fills a batch up to. Where pads are attended to, as in SigLIP, only ``max_length`` gives the author's features."""
    whole_vocabulary: ClassVar[bool] = True
    """Whether a tower has an embedding for each of its tokens and no more; False: it may have more."""
    context_length: int
    """Longest text in tokens, special ones included."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What its vocabulary is called in messages, e.g. the file's name."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """What padding is filled with. It may be a real token too: only `mask` says which is which."""

    def check_rows(self, rows: int, source: str) -> None:
        """Refuse a text tower of so many embeddings; where reading the vocabulary is slow, when it is first used.

        Raises:
            RequestError: there are too few, or too many for a vocabulary that is whole.
        """
        found = self.vocab_size
        if found > rows or (found != rows and self.whole_vocabulary):
            raise RequestError(
                f"{source}: the vocabulary {self.name} has {found:,} tokens, the text tower "
                f"{rows:,}; put the tower's own vocabulary beside its weights"
            )
        if self.pad_id >= rows:
            raise RequestError(
                f"{source}: texts are filled up with token {self.pad_id}, and the text tower has {rows:,}; fetch it again"
            )

    def once_read(self, tell: Callable[[Tokenizer], None]) -> None:
        """Call it with the tokenizer: now, or where reading the vocabulary is slow, when it is first used."""
        tell(self)

    @abstractmethod
    def prepare(self, text: str) -> str:
        """The text as it is tokenised. Two texts of equal preparation are the same text, no negatives of each other."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, at most `context_length` of them, not padded."""

    def prepared(self, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
        """`prepare` and `encode` of each text; kinds whose preparation is dear do it once for both."""
        return [self.prepare(text) for text in texts], self.encode(texts)

    def packed(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """`prepared` for millions: the prepared texts, all ids behind one another, and how many are each text's; int64 both."""
        ready, ids = self.prepared(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return ready, np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths

    @abstractmethod
    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before it is cut, special ones included."""

    def pad(
        self, ids: Sequence[Sequence[int] | np.ndarray], length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of ids → `input_ids` and `attention_mask`, both int64 ``[n, tokens]``; 1 in the mask is what is attended to.

        Args:
            length: of every row; None is the tokenizer's own rule.
        """
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        if length is None:
            length = self.context_length if self.padding == "max_length" else int(lengths.max(initial=1))
        real = np.arange(length) < lengths[:, None]
        padded = np.full(real.shape, self.pad_id, dtype=np.int64)
        if len(ids):
            padded[real] = np.concatenate(ids)
        input_ids = torch.from_numpy(padded)
        return input_ids, self.mask(input_ids)

    @abstractmethod
    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The `attention_mask` of padded ids, from the ids alone: for graphs that are given nothing else. Traceable."""

    @abstractmethod
    def with_context_length(self, context_length: int) -> Tokenizer:
        """The same, for texts of another length.

        Raises:
            RequestError: no such length is possible.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the vocabulary and the rules: equal ones give equal ids."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's description says of it beside its files, as JSON."""
        return {"kind": self.kind}

    @classmethod
    @abstractmethod
    def read(cls, place: Path | None, context_length: int, described: dict[str, Any]) -> Tokenizer:
        """Of the files `save` wrote and what `describe` gave.

        Args:
            place: their folder; for kinds whose vocabulary is one file, that file; None for a kind that has its own.

        Raises:
            RequestError: they cannot be read.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write its files, as transformers reads them where it can."""


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one input, which may be computed as one: ``owner.<method>(tokens)`` gives the output of each."""

    owner: nn.Module
    method: str
    layers: list[nn.Linear]


class Tower(nn.Module, ABC):
    """What both towers promise."""

    kind: ClassVar[str]
    """Its word in a checkpoint's description and in a recipe."""
    schema: ClassVar[type[Part]]
    """What `describe` gives, for checking what a file says."""
    layer_names: ClassVar[tuple[str, str] | None] = None
    """The description's key for the number of layers, and the pattern of tensors' names whose group is a layer's number: so
    that a number the weights do not have is refused before so many layers are laid out."""
    file_prefixes: ClassVar[tuple[str, ...]] = ()
    """How its parameters' names begin where files hold them without ``image_tower.`` or ``text_tower.`` before; () puts that
    before every name, so that no kind of the other half can have the same."""
    can_be_new: ClassVar[bool] = True
    """Whether a recipe may make one with random weights (`fresh`)."""
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
        """All it takes besides weights to build it again, as JSON; with `kind`."""

    @classmethod
    def imports(cls, numbers: dict[str, Any]) -> str | None:
        """The code that a description of this kind names; it is imported only where the user trusts it."""
        return None

    def set_gradient_checkpointing(self, wanted: bool) -> None:
        """Compute activations anew in the backward, for less memory.

        Raises:
            RequestError: the tower cannot.
        """
        if wanted:
            raise RequestError(f"a tower of kind {self.kind} has no gradient checkpointing; leave it off")

    def graph(self) -> nn.Module:
        """What is written down for other runtimes: a module with the calls and the features of `forward`."""
        return self

    def replace_projection(self, output_dim: int) -> None:
        """A new projection with random weights, to another width.

        Raises:
            RequestError: there is none to replace.
        """
        raise RequestError(f"a tower of kind {self.kind} gives features of {self.output_dim} numbers, not {output_dim}")

    @property
    def projection_name(self) -> str | None:
        """The projection's name within the tower."""
        projection = self.projection
        return next((name for name, module in self.named_modules() if module is projection), None)

    def in_projection(self, name: str) -> bool:
        """Whether the parameter of this name (within the tower) belongs to the projection."""
        own = self.projection_name
        return own is not None and name.startswith(f"{own}.")

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for this parameter: not for biases, norms and embeddings."""
        return parameter.ndim >= 2 and "embedding" not in name


class ImageTower(HasPatches, Tower):
    """Pixels in, features out: a trunk, which a feature cache can stand for, and a projection."""

    preprocessing: Preprocessing
    """From an encoded picture to what `trunk` takes."""
    patch_dropout: float | None = None
    """Share of the patches left out of a training step, drawn per picture (arXiv 2212.00794); None where it cannot."""
    any_size: bool = False
    """Whether it takes squares of any side, not those of `preprocessing` alone."""
    channels_last_on: tuple[str, ...] = ()
    """Kinds of devices on which pixels and weights lie with their channels together in memory; none where attention does the work."""

    @classmethod
    @abstractmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> ImageTower:
        """Of a checked description. Called on torch's meta device, unless it `imports` code."""

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int, image_size: int | None = None) -> ImageTower:
        """With random weights, of what a recipe gives beside `kind`.

        Raises:
            RequestError: naming the key that is not known or does not fit.
        """
        raise RequestError(f"model.start.image.kind: {cls.kind} cannot be made new")

    @classmethod
    def resized(
        cls, numbers: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
    ) -> tuple[dict[str, Any], list[str]]:
        """Another resolution for weights that are there.

        Args:
            numbers: a checked description.
            tensors: by the tower's own names; changed in place.

        Returns:
            The new description, and what to say about it.

        Raises:
            RequestError: the tower has no such resolution.
        """
        raise RequestError(
            f"image_size {image_size}: a tower of kind {cls.kind} has a size of its own: model.image_size=null"
        )

    def set_budget(self, max_patches: int) -> None:
        """See at most so many patches of a picture.

        Raises:
            RequestError: it sees all pictures in one size.
        """
        raise RequestError(
            f"model.max_patches is {max_patches}: a tower of kind {self.kind} sees all pictures in one size: "
            "model.max_patches=null, or another size with model.image_size=N"
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        return self.preprocessing.size

    def size_in(self, numbers: dict[str, Any]) -> int:
        """The same of another description of this tower, one before `resized`."""
        with torch.device("meta"):
            return self.described(numbers, 1).image_size

    @property
    def memory_format(self) -> torch.memory_format:
        """How pixels ``[n, 3, s, s]`` lie in memory that `trunk` gets, on the device where the tower is."""
        last = next(self.parameters()).device.type in self.channels_last_on
        return torch.channels_last if last else torch.contiguous_format

    def lay_out(self) -> None:
        """Bring the weights of convolutions, and of nothing else, into the `memory_format` of this device; values stay."""
        for module in self.modules() if self.channels_last_on else ():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=self.memory_format)

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

    schema: ClassVar[type[TextPart]]
    position_names: ClassVar[tuple[str, str] | None] = None
    """The description's key for the number of learnt positions, and their tensor by its name in a file: what is stretched for
    longer texts; None where there are none."""
    max_length: int
    """Longest text it has positions for, in tokens."""
    vocab_size: int

    @classmethod
    def with_positions(cls, numbers: dict[str, Any], count: int) -> dict[str, Any]:
        """A checked description with another number of learnt positions."""
        assert cls.position_names is not None
        return numbers | {cls.position_names[0]: count}

    @classmethod
    @abstractmethod
    def described(cls, numbers: dict[str, Any], output_dim: int) -> TextTower:
        """Of a checked description. Called on torch's meta device, unless it `imports` code."""

    @classmethod
    def poolings(
        cls, numbers: dict[str, Any], names: Collection[str], tokenizer: Tokenizer
    ) -> dict[str, dict[str, Any]]:
        """The poolings a tower with tensors of these `names` can have, each with its checked description; {} where its kind decides."""
        return {}

    @classmethod
    def fresh(cls, numbers: dict[str, Any], output_dim: int) -> TextTower:
        """With random weights, of what a recipe gives beside `kind`.

        Raises:
            RequestError: naming the key that is not known or does not fit.
        """
        raise RequestError(f"model.start.text.kind: {cls.kind} cannot be made new")

    @abstractmethod
    def tokenizer(self, context_length: int | None = None) -> Tokenizer:
        """The tokenizer of a tower that brings no vocabulary file; None is the kind's own length, at most `max_length`."""

    @abstractmethod
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 ``[n, tokens]`` twice, as `Tokenizer.pad` gives them → ``[n, output_dim]``."""

    def linear_groups(self) -> list[LinearGroup]:
        """Linear layers that a quick way for short texts may compute together; all others it takes one by one."""
        return []

    def example(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`input_ids` and `attention_mask` of `count` texts without padding, valid for the tower, on its device."""
        device = next(self.parameters()).device
        ids = torch.full((count, length), self.vocab_size // 2, device=device)
        return ids, torch.ones_like(ids)
