"""Distillation beside a stage's own objective: what of a frozen teacher is met, its loss, its step.

For a batch with the student's unit features x (pictures), y (texts) and temperature s, and the teacher's x', y', s'::

    loss = pairs · objective(x, y)
         + features · mean ½(‖x − x'‖² + ‖y − y'‖²)
         + similarities · ½(mean KL(softmax(s'·x'·y'ᵀ) ‖ softmax(s·x·yᵀ)) + the same for texts)

the softmax over all texts (pictures) of the global batch; after CLIP-KD (arXiv 2307.12732) and MobileCLIP (arXiv 2311.17049).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cnclip_ft.collectives import gather_rows, gather_rows_detached, sum_over_ranks, world_size
from cnclip_ft.features.pair_teacher import PairTeacher, TaughtPairs
from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_stage import Distill
from cnclip_ft.training.context import Context
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import LossOutput, choose_tile
from data_tools.errors import RequestError
from data_tools.words import Said


@dataclass(frozen=True)
class Distilling:
    """A teacher beside the pairs; `live`: it sees the pictures in every step, as they are augmented."""

    teacher: PairTeacher
    live: bool

    def describe(self, dim: int, setting: Distill) -> list[Said]:
        """Lines of the plan."""
        mapped = Said(
            ", mapped to the {dim} of the model without weights of its own",
            "，映射到模型的 {dim} 维，映射没有自己的权重",
            dim=dim,
        )
        how = Said("computed once", "只算一次")
        if self.live:
            how = Said(
                "of texts computed once, of pictures in every step, as they are augmented",
                "文本的只算一次，图片每步都增强，故每步都算",
            )
        return [
            Said(
                "    distils from {place} ({width} wide{mapped}): its features are {how}",
                "    从 {place} 蒸馏（{width} 维{mapped}）：其特征{how}",
                place=self.teacher.place,
                width=self.teacher.width,
                how=how,
                mapped=mapped if self.teacher.width != dim else "",
            ),
            Said(
                "    {pairs:g} · objective + {features:g} · squared distance to its features + {similarities:g} · divergence from its "
                "similarities",
                "    {pairs:g} · 目标函数 + {features:g} · 与其特征的平方距离 + {similarities:g} · 与其相似度的散度",
                pairs=setting.pairs,
                features=setting.features,
                similarities=setting.similarities,
            ),
        ]


def plan_distilling(context: Context, name: str, setting: Stage, *, cached: bool) -> Distilling | None:
    """Open the teacher, and see that it can be used.

    Args:
        cached: the model's own frozen features are computed once, in the views the stage has.

    Raises:
        RequestError: naming the setting.
    """
    if setting.distill is None:
        return None
    key = f"stages.{name}.distill.teacher"
    teacher = PairTeacher.look(setting.distill.teacher, key, context.recipe.model.source, context.trust_import)
    live = setting.augment.changes and not cached
    if live and len(teacher.shape) != 3:
        raise RequestError(
            f"{key}: {teacher.place} takes each picture in its own shape, and this stage augments pictures of one size in every step. "
            f"Give stages.{name}.augment={{}}, or name a teacher of one size: {key}=CHECKPOINT"
        )
    return Distilling(teacher, live)


def distillation(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    teacher_images: torch.Tensor,
    teacher_texts: torch.Tensor,
    teacher_scale: torch.Tensor,
    setting: Distill,
    tile: int | None = None,
) -> torch.Tensor:
    """The two terms of the teacher (module docstring), a scalar with gradient.

    Args:
        images, texts, teacher_images, teacher_texts: unit ``[n, dim]`` of this device's pairs.
        scale, teacher_scale: temperatures as factors of the cosine.
        tile: rows of a score matrix held at once; None chooses from the batch.

    As the losses of `training.loss`: the value is that of the global batch on every device, its gradient W times the device's share.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.to(dtype), texts.to(dtype)
        met, said = (each.to(images.device, dtype) for each in (teacher_images, teacher_texts))
        loss = images.new_zeros(())
        if setting.features:
            apart = (images - met).square().sum(1) + (texts - said).square().sum(1)
            loss = loss + setting.features * apart.mean() / 2
        if setting.similarities:
            scale, teacher_scale = scale.to(dtype), teacher_scale.to(images.device, dtype)
            ways = ((images, texts, met, said), (texts, images, said, met))
            both = torch.stack([_divergence(*way, scale, teacher_scale, tile) for way in ways])
            loss = loss + setting.similarities * both.mean()
        everywhere = sum_over_ranks(loss.detach().clone()) / world_size()
        return loss + (everywhere - loss.detach())


def _divergence(
    rows: torch.Tensor,
    columns: torch.Tensor,
    teacher_rows: torch.Tensor,
    teacher_columns: torch.Tensor,
    scale: torch.Tensor,
    teacher_scale: torch.Tensor,
    tile: int | None,
) -> torch.Tensor:
    """Mean over this device's rows of KL(teacher ‖ student) over the columns of all devices. A tile is computed again in backward."""
    columns, teacher_columns = gather_rows(columns), gather_rows_detached(teacher_columns)

    def of_tile(own: torch.Tensor, others: torch.Tensor, taught: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        wanted = torch.log_softmax(teacher_scale * (taught @ teacher_columns.T), 1)
        found = torch.log_softmax(factor * (own @ others.T), 1)
        return (wanted.exp() * (wanted - found)).sum()

    total = rows.new_zeros(())
    size = tile or choose_tile(len(columns), rows.device)
    for own, taught in zip(rows.split(size), teacher_rows.split(size), strict=True):
        total = total + checkpoint(of_tile, own, columns, taught, scale, use_reentrant=False, preserve_rng_state=False)
    return total / len(rows)


class DistillStep(GradientStep):
    """The gradient of a batch of pairs with what the teacher says of them.

    Args:
        taught: the teacher's features; where it has none of the pictures it is shown each as it is augmented, once a step.
        setting: the weights.
    """

    def __init__(self, model: Any, *arguments: Any, taught: TaughtPairs, setting: Distill, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.taught, self.setting = taught, setting
        self._seen: list[torch.Tensor] = []
        self._wanted = 0
        if taught.images is None:
            self.augment = self._shown(self.augment)

    def __call__(self, batch: dict[str, Any]) -> LossOutput:
        self._seen, self._wanted = [], len(batch["image_keys"])
        return super().__call__(batch)

    def _shown(self, augment: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Augmented pixels are the teacher's too; micro-batches are augmented a second time, alike, for their backward."""

        def shown(pixels: torch.Tensor) -> torch.Tensor:
            pixels = augment(pixels)
            if sum(map(len, self._seen)) < self._wanted:
                self._seen.append(self.taught.encode_pixels(pixels))
            return pixels

        return shown

    def _loss(self, images: torch.Tensor, texts: torch.Tensor, batch: dict[str, Any]) -> LossOutput:
        own = super()._loss(images, texts, batch)
        texts = texts if texts.ndim == 2 else texts[:, 0]
        met = batch["teacher_images"] if "teacher_images" in batch else torch.cat(self._seen)
        learnt = distillation(
            images, texts, self.model.logit_scale.exp(), met, batch["teacher_texts"], self.taught.scale, self.setting
        )
        self.parts = {"pairs": own.loss.detach(), **self.parts, "teacher": learnt.detach()}
        return LossOutput(self.setting.pairs * own.loss + learnt, own.accuracy)
