"""Image tower, text tower and temperature as one model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.contract import ImageTower, TextTower, Tokenizer
from cnclip_ft.models.dense import Patches, Tokens
from cnclip_ft.models.families.chinese_clip.catalog import Architecture
from cnclip_ft.models.heads import GroundingHeads, Regions
from cnclip_ft.models.modes import evaluation_mode
from cnclip_ft.models.preprocessing import PictureSource
from data_tools.errors import RequestError

T = TypeVar("T")
LOGIT_SCALE_START = math.log(1 / 0.07)
LOGIT_SCALE_LIMIT = math.log(100)


class DualEncoder(nn.Module):
    """Two towers that meet in one space (CLIP, arXiv 2103.00020).

    Args:
        image_tower, text_tower: as `models.contract` has them.
        tokenizer: carries vocabulary and context length.
        architecture: the catalogue's entry, or None for towers that are not in it.
    """

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        tokenizer: Tokenizer,
        architecture: Architecture | None,
    ) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE_START))
        # A number added to every cosine times temperature; there only where a sigmoid loss has learnt one (SigLIP).
        self.logit_bias: nn.Parameter | None
        self.register_parameter("logit_bias", None)
        # What gives boxes for phrases; there only where a stage has learnt it.
        self.heads: GroundingHeads | None
        self.register_module("heads", None)
        self.tokenizer, self.architecture = tokenizer, architecture
        self.narrowed: int | None = None  # numbers of a feature, where more were trained
        self.own_image_size: int | None = None  # the checkpoint's, where pictures are taken at another

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    @property
    def image_size(self) -> int:
        return self.image_tower.image_size

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.image_tower.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> DualEncoder:
        """As `nn.Module` moves and converts; convolutions then lie in memory as the device wants them."""
        super()._apply(fn, recurse)
        self.image_tower.lay_out()
        return self

    # ---- where the image trunk lies -----------------------------------------------------------------------------

    def _of_trunk(self) -> Iterator[nn.Module]:
        """Modules of the image tower whose own tensors are the trunk's alone, neither the projection's nor the text tower's."""
        projection = self.image_tower.projection
        others = set(self.text_tower.parameters()) | set(() if projection is None else projection.parameters())
        left_out = set(() if projection is None else projection.modules())
        for module in self.image_tower.modules():
            if module not in left_out and others.isdisjoint(module.parameters(recurse=False)):
                yield module

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Those that `place_trunk` moves."""
        for module in self._of_trunk():
            yield from module.parameters(recurse=False)

    def place_trunk(self, device: torch.device | str) -> None:
        """Weights and buffers of the image trunk on another device than the rest, where cached features stand for it.

        As `nn.Module.to`, in place; `device` stays that of the rest, and `to` brings everything together again.
        """
        for module in self._of_trunk():
            module._apply(lambda tensor: tensor.to(device), recurse=False)

    @contextmanager
    def trunk_at_hand(self) -> Iterator[None]:
        """Inside, the image trunk is where the rest is; afterwards it is where it was."""
        places = {p.device for p in self.trunk_parameters()} - {self.device}
        if not places:
            yield
            return
        self.place_trunk(self.device)
        try:
            yield
        finally:
            self.place_trunk(places.pop())

    # ---- features ---------------------------------------------------------------------------------------------

    def image_trunk(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, *preprocessing.shape]`` → ``[n, width]``, before the projection: what a feature cache keeps."""
        return self.image_tower.trunk(self._ready(pixels))

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, *preprocessing.shape]`` on the model's device → unit ``[n, dim]`` fp32 (fp64 of an fp64 model)."""
        return _unit(self.image_tower(self._ready(pixels)))  # the tower's call is what may be compiled

    def patch_features(self, pixels: torch.Tensor, method: str) -> Patches:
        """uint8 ``[n, *preprocessing.shape]`` → unit features of patches, ``[n, patches, dim]`` as `image_features` has them.

        Raises:
            RequestError: the image tower has none by this method.
        """
        found = self.image_tower.patches(self._ready(pixels), method)
        return found._replace(features=_unit(found.features))

    def image_tokens(self, pixels: torch.Tensor) -> Tokens:
        """uint8 ``[n, *preprocessing.shape]`` → tokens of patches for learnt heads, and what `image_trunk` gives.

        Raises:
            RequestError: the image tower has none.
        """
        return self.image_tower.tokens(self._ready(pixels))

    def regions(self, pixels: torch.Tensor) -> Regions:
        """uint8 ``[n, *preprocessing.shape]`` → regions with boxes, and what a phrase is compared with (`models.heads`).

        Raises:
            RequestError: the model has not learnt boxes.
        """
        if self.heads is None:
            raise RequestError(
                "this model has not learnt boxes: train it in a stage of kind ground (docs/training.md#learning-boxes)"
            )
        return self.heads(self.image_tokens(pixels))

    def _ready(self, pixels: torch.Tensor) -> torch.Tensor:
        tower = self.image_tower
        if pixels.ndim == 4:  # as bytes, a quarter of what they are once normalised, which keeps the order
            pixels = pixels.contiguous(memory_format=tower.memory_format)
        return tower.preprocessing.normalise(pixels, self.dtype)

    def text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """int64 ``[n, tokens]`` twice → unit ``[n, dim]`` fp32 (fp64 of an fp64 model)."""
        return _unit(self.text_tower(input_ids, attention_mask))

    def forward(
        self,
        pixels: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        trunk: torch.Tensor | None = None,
        region_pixels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Unit features of whatever is given; `trunk` (``[n, width]``) stands for pixels already walked once, and of `region_pixels` all
        numbers of their regions come, ``[n, patches, dim + 6]``."""
        images = texts = None
        if region_pixels is not None:
            found = self.regions(region_pixels)
            images = torch.cat([found.boxes, found.features, found.shift[..., None], found.factor[..., None]], dim=2)
        elif trunk is not None:
            images = _unit(self.image_tower.project(trunk.to(self.dtype)))
        elif pixels is not None:
            images = self.image_features(pixels)
        if input_ids is not None and attention_mask is not None:
            texts = self.text_features(input_ids, attention_mask)
        return images, texts

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keep the temperature in [0, ln 100], as the official code does after every step.

        That of a model with a bias is free, as in SigLIP's training (arXiv 2303.15343): published ones lie near ln 117.
        """
        if self.logit_bias is None:
            self.logit_scale.clamp_(0, LOGIT_SCALE_LIMIT)

    def set_gradient_checkpointing(self, image: bool, text: bool) -> None:
        self.image_tower.set_gradient_checkpointing(image)
        self.text_tower.set_gradient_checkpointing(text)

    # ---- for callers outside training -------------------------------------------------------------------------

    def encode_images(self, images: PictureSource | Iterable[PictureSource], batch_size: int = 64) -> torch.Tensor:
        """Pictures → unit float32 ``[n, dim]`` on the CPU; a single one gives ``[1, dim]``.

        Args:
            images: one picture or any number of them, a generator too, of which a batch is held at a time: paths, encoded
                bytes, Pillow images, uint8 pixels (numpy ``[h, w, 3]``, torch ``[3, h, w]``; with an axis before, many).

        Raises:
            DataFault: an image cannot be decoded.
            RequestError: `batch_size` is no number above 0.
        """
        parts = [torch.empty(0, self.image_tower.output_dim)]
        with evaluation_mode(self), torch.inference_mode():
            many: Any = [images] if _is_picture(images) else images
            for some in _batches(many, batch_size):
                pixels = torch.stack([self.image_tower.preprocessing.decode(image) for image in some])
                parts.append(self.image_features(pixels.to(self.device)).float().cpu())
        return torch.cat(parts)  # outside of inference mode, so that it may take part in a gradient

    def encode_texts(self, texts: str | Iterable[str], batch_size: int = 256) -> torch.Tensor:
        """Texts → unit float32 ``[n, dim]`` on the CPU, in the order given; a single one gives ``[1, dim]``.

        Args:
            texts: one or any number of them, a generator too, of which 64 batches are held at a time; among those, texts of
                like length share a batch.

        Raises:
            RequestError: a text is no str, or `batch_size` no number above 0.
        """
        parts = [torch.empty(0, self.text_tower.output_dim)]
        with evaluation_mode(self), torch.inference_mode():
            for some in _batches(each_text(texts), batch_size, 64):
                ids = self.tokenizer.encode(some)
                order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
                part = torch.empty(len(ids), self.text_tower.output_dim)
                for rows in _batches(order, batch_size):
                    input_ids, mask = self.tokenizer.pad([ids[row] for row in rows])
                    part[rows] = self.text_features(input_ids.to(self.device), mask.to(self.device)).float().cpu()
                parts.append(part)
        return torch.cat(parts)

    def ground(self, picture: PictureSource, phrases: str | Iterable[str], **how: Any) -> list[Any]:
        """Where phrases are in a picture: a list of `grounding.finder.Grounded`, one a phrase, with heat map, boxes and scores.

        Args:
            phrases: a sentence, which is split into phrases, or phrases as they stand.
            how: `method`, `threshold` and `most`, as `grounding.finder.ground` has them.

        Raises:
            RequestError: no phrase, an unknown method, or an image tower that gives no features of patches.
            DataFault: the picture cannot be decoded.
        """
        # That room lies above this one: it is looked up when it is asked for, as the package does with its own names.
        (found,) = import_module("cnclip_ft.grounding.finder").ground(self, [picture], phrases, **how)
        return list(found)


def each_text(texts: str | Iterable[str]) -> Iterator[str]:
    """Of one or any number of texts.

    Raises:
        RequestError: one is no str.
    """
    for text in texts if _is_many(texts) and not isinstance(texts, (str, bytes)) else [texts]:
        if not isinstance(text, str):
            raise RequestError(f"a text is {repr(text)[:40]} ({type(text).__name__}); expected str")
        yield text


def _is_picture(images: Any) -> bool:
    """A single one, or what `decode` refuses as one: a file that is open would give its lines, bytes their numbers."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim != 1 and images.ndim < 4
    return isinstance(images, PictureSource) or hasattr(images, "read") or not _is_many(images)


def _is_many(items: Any) -> bool:
    return hasattr(items, "__iter__") or hasattr(items, "__getitem__")


def _batches(items: Iterable[T], size: int, times: int = 1) -> Iterator[list[T]]:
    """Lists of `times` · `size`, the last one shorter."""
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise RequestError(f"batch_size is {repr(size)[:40]}, expected a whole number from 1")
    walk = iter(items)
    while some := list(itertools.islice(walk, int(size) * times)):
        yield some


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Unit rows, in fp32 at least: half precision has too few bits for small differences of cosines."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
