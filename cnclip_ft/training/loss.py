"""Contrastive objectives, computed in row tiles, with ids that say what is not a negative.

x, y are unit features ``[n, dim]`` of n pairs, z = s·x·yᵀ with s = exp(logit_scale). The logits are never
held as a whole: a tile of rows is computed, folded into running log-sum-exps and dropped, and computed again in
backward. Extra memory is O(n · tile) instead of O(n²).

On W devices each brings its own n pairs. A rank computes its image rows against all texts; the log-sum-exps of
the columns are combined over ranks, and the gather carries gradient, so the result is that of one process
holding all W·n pairs. The value returned is the global loss, the same on every rank; its gradient is W times
the share of this rank, because gradients are averaged over devices.

Two pairs with the same image or the same text are not negatives of each other (`positives`):

* ``exclude``: they are left out of each other's denominator;
* ``soft``: they share the target evenly;
* ``ignore``: ids are not looked at (the official code).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from cnclip_ft.collectives import (
    gather_rows,
    gather_rows_detached,
    log_sum_exp_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from cnclip_ft.recipe_stage import Objective as Setting
from cnclip_ft.runtime import to_device
from data_tools.errors import RequestError, UserError

Positives = Literal["exclude", "soft", "ignore"]


class LossOutput(NamedTuple):
    """`loss`: scalar with gradient; `accuracy`: share of images and texts whose own partner scores highest."""

    loss: torch.Tensor
    accuracy: torch.Tensor


class Keys(NamedTuple):
    """int64 ids of the local pairs ``[n]`` and of all ``[N]``."""

    image: torch.Tensor
    text: torch.Tensor
    all_image: torch.Tensor
    all_text: torch.Tensor


@dataclass
class Batch:
    """What a tile needs to know: local rows, all columns, and which column is a row's own."""

    keys: Keys | None  # None where ids are ignored
    offset: int  # column of the first local row's partner
    tile: int


def choose_tile(columns: int, device: torch.device) -> int:
    """Rows per tile: what a few tile-sized buffers may cost, a CPU's cache or a small part of a GPU's memory."""
    budget = 16 * 2**20 if device.type == "cpu" else 256 * 2**20
    return max(16, min(4096, budget // (4 * max(columns, 1))))


def _same(batch: Batch, rows: slice) -> torch.Tensor | None:
    """bool ``[t, N]``: shares the image or the text with the row (its own partner included); None without ids."""
    keys = batch.keys
    if keys is None:
        return None
    same = keys.image[rows, None] == keys.all_image[None]
    return same.logical_or_(keys.text[rows, None] == keys.all_text[None])


def _own(batch: Batch, rows: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (row in tile, column) of each row's own partner."""
    inside = torch.arange(rows.stop - rows.start, device=device)
    return inside, inside + rows.start + batch.offset


def _tiles(count: int, tile: int) -> list[slice]:
    return [slice(start, min(start + tile, count)) for start in range(0, count, tile)]


class _TiledInfoNCE(torch.autograd.Function):
    """Symmetric cross-entropy over tiles; saves the features and the two log-sum-exp vectors only."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        batch: Batch,
        soft: bool,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, columns = len(images), len(texts)
        total = count * world_size()
        new = images.new_zeros
        row_lse, row_hit = new(count), new(())
        column_max, column_sum = new(columns).fill_(-torch.inf), new(columns)
        # Sums of the logits of all positives, and of all allowed pairs, per row and column: the targets' share.
        row_counts, column_counts = new(count, 2), new(columns, 2)
        row_sums, column_sums = new(count, 2), new(columns, 2)
        own_logit = new(count)
        for rows in _tiles(count, batch.tile):
            z = images[rows] @ texts.T
            z *= scale
            own = _own(batch, rows, z.device)
            own_logit[rows] = z[own]
            same = _same(batch, rows)
            if soft:
                _add_sums(z, same, own, rows, 0, row_counts, column_counts, row_sums, column_sums)
            elif same is not None:
                same[own] = False
                z.masked_fill_(same, -torch.inf)
            if smoothing:
                allowed = None if soft or same is None else ~same
                _add_sums(z, allowed, None, rows, 1, row_counts, column_counts, row_sums, column_sums)
            row_max = z.amax(1)
            row_hit += (own_logit[rows] >= row_max).sum()
            tile_max = z.amax(0)
            new_max = torch.maximum(column_max, tile_max)
            column_sum *= torch.exp(column_max - new_max)
            column_sum += torch.exp(z - new_max).sum(0)
            column_max = new_max
            row_lse[rows] = row_max + torch.exp_(z.sub_(row_max[:, None])).sum(1).log_()
        local_columns = slice(batch.offset, batch.offset + count)
        column_lse = log_sum_exp_over_ranks(column_max, column_sum)
        sum_over_ranks(column_counts), sum_over_ranks(column_sums)

        def target(counts: torch.Tensor, sums: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            main = sums[:, 0] / counts[:, 0] if soft else own
            return (1 - smoothing) * main + smoothing * sums[:, 1] / counts[:, 1] if smoothing else main

        own_counts, own_sums = column_counts[local_columns], column_sums[local_columns]
        value = row_lse.sum() + column_lse[local_columns].sum()
        value -= target(row_counts, row_sums, own_logit).sum() + target(own_counts, own_sums, own_logit).sum()
        column_best = column_max.clone()
        if world_size() > 1:
            torch.distributed.all_reduce(column_best, op=torch.distributed.ReduceOp.MAX)
        hits = row_hit + (own_logit >= column_best[local_columns]).sum()
        numbers = sum_over_ranks(torch.stack([value, hits.to(value.dtype)]))
        ctx.save_for_backward(images, texts, scale, row_lse, column_lse, row_counts, column_counts)
        ctx.batch, ctx.soft, ctx.smoothing, ctx.total = batch, soft, smoothing, total
        return numbers[0] / (2 * total), numbers[1] / (2 * total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_accuracy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, texts, scale, row_lse, column_lse, row_counts, column_counts = ctx.saved_tensors
        batch, soft, smoothing = ctx.batch, ctx.soft, ctx.smoothing
        grad_images, grad_texts = torch.empty_like(images), torch.zeros_like(texts)
        grad_scale = torch.zeros_like(scale)
        for rows in _tiles(len(images), batch.tile):
            z = images[rows] @ texts.T  # cosines; scaled below, unscaled again for the temperature
            logits = z * scale
            own = _own(batch, rows, z.device)
            same = _same(batch, rows)
            if same is not None and not soft:
                same[own] = False
                logits.masked_fill_(same, -torch.inf)
            weight = torch.exp(logits - column_lse)
            weight += torch.exp_(logits.sub_(row_lse[rows, None]))
            if soft:
                positive = same.to(z.dtype) if same is not None else torch.zeros_like(z).index_put_(own, z.new_ones(()))
                share = 1 / row_counts[rows, :1] + 1 / column_counts[:, 0]
                weight -= positive * share * (1 - smoothing)
            else:
                weight[own] -= 2 * (1 - smoothing)
            if smoothing:
                spread = smoothing * (1 / row_counts[rows, 1:] + 1 / column_counts[:, 1])
                weight -= spread if soft or same is None else spread.masked_fill(same, 0.0)
            grad_scale += torch.vdot(weight.flatten(), z.flatten())
            grad_images[rows] = weight @ texts
            grad_texts.addmm_(weight.T, images[rows])
        factor = grad_loss * world_size() / (2 * ctx.total)
        return grad_images * (factor * scale), grad_texts * (factor * scale), grad_scale * factor, None, None, None


def _add_sums(
    z: torch.Tensor,
    chosen: torch.Tensor | None,
    own: tuple[torch.Tensor, torch.Tensor] | None,
    rows: slice,
    kind: int,
    row_counts: torch.Tensor,
    column_counts: torch.Tensor,
    row_sums: torch.Tensor,
    column_sums: torch.Tensor,
) -> None:
    """Count the chosen pairs of a tile and add up their logits, per row and per column.

    `chosen` None means every pair, or, where `own` is given, each row's own partner alone.
    """
    if chosen is None and own is not None:
        chosen = torch.zeros_like(z, dtype=torch.bool).index_put_(
            own, torch.ones((), dtype=torch.bool, device=z.device)
        )
    picked = z if chosen is None else z.masked_fill(~chosen, 0.0)
    ones = torch.ones_like(z) if chosen is None else chosen.to(z.dtype)
    row_counts[rows, kind], row_sums[rows, kind] = ones.sum(1), picked.sum(1)
    column_counts[:, kind] += ones.sum(0)
    column_sums[:, kind] += picked.sum(0)


def _all_alike(keys: torch.Tensor) -> bool:
    numbers = keys.cpu().numpy()
    return bool((numbers == numbers[0]).all())


def _prepare(
    images: torch.Tensor,
    texts: torch.Tensor,
    image_keys: torch.Tensor | None,
    text_keys: torch.Tensor | None,
    positives: Positives,
    tile: int | None,
) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Promote to fp32, gather texts (with gradient) and ids, and describe the batch."""
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(f"features must be two [n, dim] tensors of one shape, got {images.shape} and {texts.shape}")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    images, texts = images.to(dtype), gather_rows(texts.to(dtype))
    keys = None
    if positives != "ignore":
        if image_keys is None or text_keys is None:
            raise ValueError(f"positives={positives!r} needs the image and text keys of the batch")
        # Asked of the keys while they are on the CPU: an answer of the device would be waited for.
        alike = [positives == "exclude" and _all_alike(k) for k in (image_keys, text_keys)]
        image_keys, text_keys = to_device(image_keys, images.device), to_device(text_keys, images.device)
        keys = Keys(image_keys, text_keys, gather_rows_detached(image_keys), gather_rows_detached(text_keys))
        if any(same and _all_alike(k) for same, k in zip(alike, keys[2:], strict=True)):
            raise UserError(
                f"all {len(keys.all_image)} pairs of the batch show the same image or carry the same text, so there is nothing "
                "to tell apart. Use a larger stages.STAGE.batch_size=N, or `cnclip-ft data check` to find the repetition."
            )
    tile = tile or choose_tile(len(texts), images.device)
    return images, texts, Batch(keys, offset=rank() * len(images), tile=tile)


@dataclass(frozen=True)
class Aim:
    """What a stage makes small, as far as its plan and its checkpoints tell of it.

    Args:
        dimensions: the loss is the mean over features cut to each of these widths, and whole ones (Matryoshka, arXiv 2205.13147).
    """

    dimensions: tuple[int, ...] = field(default=(), kw_only=True)

    kind: ClassVar[str]
    """Its word in a recipe."""
    biased: ClassVar[bool] = False
    """Whether the model's bias takes part, and trains."""
    initial_logit_scale: ClassVar[float] = 0.0
    """Where it takes part: what the temperature is set to in a model that has no bias yet."""
    initial_logit_bias: ClassVar[float] = 0.0
    """The same of the bias."""


@dataclass(frozen=True)
class Objective(Aim, ABC):
    """A loss over all pairs of a global batch, without parameters of its own.

    Args:
        positives: what becomes of other pairs with the same image or text (module docstring).
        tile: rows per tile; None chooses from the batch.
    """

    positives: Positives = "exclude"
    tile: int | None = field(default=None, kw_only=True)

    smooths: ClassVar[bool] = False
    """Whether it knows a `label_smoothing`."""

    @classmethod
    def of(cls, setting: Setting) -> Objective:
        """As a recipe has it."""
        smoothing: dict[str, Any] = {"label_smoothing": setting.label_smoothing} if cls.smooths else {}
        return cls(setting.positives, tile=setting.tile, dimensions=tuple(setting.dimensions or ()), **smoothing)

    def __call__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        logit_scale: torch.Tensor,
        image_keys: torch.Tensor | None = None,
        text_keys: torch.Tensor | None = None,
        logit_bias: torch.Tensor | None = None,
    ) -> LossOutput:
        """`images`, `texts`: unit ``[n, dim]``; `logit_scale` (log space), `logit_bias`: scalars; keys: int64 ``[n]``.

        The accuracy is that of whole features.
        """
        with torch.autocast(images.device.type, enabled=False):
            x, y, batch = _prepare(images, texts, image_keys, text_keys, self.positives, self.tile)
            scale = logit_scale.to(x.dtype).exp()
            whole = LossOutput(*self.tiled(x, y, scale, logit_bias, batch))
            if not self.dimensions:
                return whole
            losses = [whole.loss]
            for width in self.dimensions:
                images, texts = F.normalize(x[:, :width], dim=1), F.normalize(y[:, :width], dim=1)
                losses.append(self.tiled(images, texts, scale, logit_bias, batch)[0])
            return LossOutput(torch.stack(losses).mean(), whole.accuracy)

    @abstractmethod
    def tiled(
        self, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and accuracy of local images and the texts of all devices."""


@dataclass(frozen=True)
class ContrastiveObjective(Objective):
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020), the mean of both softmax cross-entropies, which do not see a bias.

    Args:
        label_smoothing: share of the target spread over all allowed pairs of a row or column.

    Example: ``loss, accuracy = ContrastiveObjective()(x, y, model.logit_scale, image_keys, text_keys)``
    """

    label_smoothing: float = 0.0

    kind: ClassVar[str] = "contrastive"
    smooths: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise RequestError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")

    def tiled(
        self, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _TiledInfoNCE.apply(images, texts, scale, batch, self.positives == "soft", self.label_smoothing)


class _TiledSigmoid(torch.autograd.Function):
    """Σ −log σ(ζ·(z + b)) / N over tiles; only the features are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        batch: Batch,
        soft: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = len(images) * world_size()
        value, hits = images.new_zeros(()), images.new_zeros(())
        for rows in _tiles(len(images), batch.tile):
            z = images[rows] @ texts.T
            own = _own(batch, rows, z.device)
            hits += (z[own] >= z.amax(1)).sum()
            logits, sign = _TiledSigmoid._signed(z, own, scale, bias, batch, rows, soft)
            value -= (torch.nn.functional.logsigmoid(sign * logits) * sign.abs()).sum()
        numbers = sum_over_ranks(torch.stack([value, hits.to(value.dtype)]))
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.batch, ctx.soft, ctx.total = batch, soft, total
        return numbers[0] / total, numbers[1] / total

    @staticmethod
    def _signed(
        z: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor],
        scale: torch.Tensor,
        bias: torch.Tensor,
        batch: Batch,
        rows: slice,
        soft: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and ζ: +1 positive, −1 negative, 0 left out."""
        sign = torch.full_like(z, -1.0)
        same = _same(batch, rows)
        if same is not None:
            sign.masked_fill_(same, 1.0 if soft else 0.0)
        sign[own] = 1.0
        return z * scale + bias, sign

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_accuracy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, texts, scale, bias = ctx.saved_tensors
        grad_images, grad_texts = torch.empty_like(images), torch.zeros_like(texts)
        grad_scale, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        for rows in _tiles(len(images), ctx.batch.tile):
            z = images[rows] @ texts.T
            own = _own(ctx.batch, rows, z.device)
            logits, sign = _TiledSigmoid._signed(z, own, scale, bias, ctx.batch, rows, ctx.soft)
            weight = -sign * torch.sigmoid(-sign * logits)
            grad_scale += torch.vdot(weight.flatten(), z.flatten())
            grad_bias += weight.sum()
            grad_images[rows] = weight @ texts
            grad_texts.addmm_(weight.T, images[rows])
        factor = grad_loss * world_size() / ctx.total
        return (
            grad_images * (factor * scale),
            grad_texts * (factor * scale),
            grad_scale * factor,
            grad_bias * factor,
            None,
            None,
        )


@dataclass(frozen=True)
class SigmoidObjective(Objective):
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343): mean over pairs of Σ −log σ(ζ·(s·x·y + b)).

    Better than the softmax below a batch of about 16,000; for a pretrained image tower its authors lower the image
    tower's rate tenfold and drop its weight decay. A model that has no bias yet begins with a temperature of 10 and a
    bias of −10.
    """

    kind: ClassVar[str] = "sigmoid"
    biased: ClassVar[bool] = True
    initial_logit_scale: ClassVar[float] = 2.302585092994046  # ln 10
    initial_logit_bias: ClassVar[float] = -10.0

    def tiled(
        self, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if bias is None:
            raise ValueError("the sigmoid loss needs a model with a bias")
        return _TiledSigmoid.apply(images, texts, scale, bias.to(images.dtype), batch, self.positives == "soft")
