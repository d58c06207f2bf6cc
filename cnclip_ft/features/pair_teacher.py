"""What a frozen teacher says of the pairs of a store: of their texts once, of their pictures once where a run shows them unchanged.

Texts lie as rows on the disk (`features.teacher`), pictures as those of a frozen trunk (`features.frozen_trunk`), in the very views
that the run's own cache would hold. Pictures that are augmented anew in every step go through the teacher in every step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cnclip_ft.data.mixture import Mixture
from cnclip_ft.features.encode import evaluating, iterate_images
from cnclip_ft.features.frozen_trunk import FeatureCache
from cnclip_ft.features.teacher import Teacher, TeacherFeatures, principal_map
from cnclip_ft.features.text_features import distinct_texts
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import at_size
from cnclip_ft.models.sums import sum_of
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.runtime import to_device
from data_tools.store import PairSource

_LOOKED_AT = 4096  # pictures, and texts, whose directions decide the map between two widths


@dataclass(frozen=True)
class PairTeacher:
    """A teacher of pictures and texts, looked at once. `digest` tells it from others; `shape` is that of its pixels."""

    texts: Teacher
    digest: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def place(self) -> str:
        return self.texts.place

    @property
    def width(self) -> int:
        return self.texts.width

    @classmethod
    def look(cls, place: str, key: str, source: str, trust_import: bool) -> PairTeacher:
        """Open it once.

        Raises:
            RequestError: naming `key`, the setting: nothing readable is there.
        """
        model, teacher = Teacher.opened(place, key, source, trust_import)
        digest = sum_of(model.image_tower.state_dict().items())  # the text tower's is the other's
        digest.update(json.dumps([teacher.digest, model.image_tower.describe()], sort_keys=True, default=str).encode())
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return cls(teacher, digest.hexdigest(), tuple(model.image_tower.preprocessing.shape), size)

    def open(self) -> DualEncoder:
        return self.texts.open().requires_grad_(False)


class TaughtPairs:
    """Unit features of the teacher, of the width of the student, for any batch of pairs.

    Where the widths differ one map without weights, made by the principal directions of the teacher's texts and pictures together,
    brings both sides to the student's: see `features.teacher.TeacherFeatures`. `kept` is the share of them that it keeps.

    Args:
        folder: where caches lie.
        dim: the student's width.
        views, augment: of the pictures; None: they are augmented in every step, and `see` is asked for them.
        autocast: makes the context the teacher computes in.
    """

    def __init__(
        self,
        folder: Path,
        teacher: PairTeacher,
        store: PairSource | Mixture,
        dim: int,
        *,
        views: int,
        augment: Augmentation | None,
        precision: str,
        seed: int,
        reduced: bool,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.teacher, self.store, self.dim, self.views, self.autocast = teacher, store, dim, views, autocast
        texts, self._text_of = distinct_texts(store)
        self.texts = TeacherFeatures(folder, teacher.texts, texts, teacher.width, precision)
        self.model = teacher.open().eval()
        self.scale = self.model.logit_scale.detach().float().exp()
        self.images: FeatureCache | None = None
        if augment is not None:
            self.images = FeatureCache(
                folder, self.model, store, views=views, augment=augment, precision=precision, seed=seed, reduced=reduced
            )
        self._map: torch.Tensor | None = None
        self.kept = 1.0

    @property
    def complete(self) -> bool:
        return self.texts.complete and (self.images is None or self.images.complete)

    @property
    def damaged(self) -> set[int]:
        """Keys of the images that could not be decoded: what is said of them is worth nothing."""
        return set() if self.images is None else self.images.damaged

    def build(
        self, accelerator: Accelerator, *, workers: int, max_damaged: int, asked_to_stop: Callable[[], bool]
    ) -> bool:
        """Compute what is missing, shared over all devices. Whether it is complete, as `TeacherFeatures.build` has it."""
        device = accelerator.device
        if not self.texts.build(accelerator, self.autocast, asked_to_stop):
            return False
        self.model.to(device)
        if self.images is not None and not self.images.build(
            accelerator, self.autocast, workers=workers, max_damaged=max_damaged, asked_to_stop=asked_to_stop
        ):
            return False
        if self.dim != self.teacher.width:
            found = torch.cat([*self._some_texts(), *self._some_images()])
            if not found.isfinite().all():  # which have no directions
                self.refuse_damage()
            self._map = principal_map(found, self.dim)
            self.kept = float((found @ self._map).square().sum(1).mean())
            self._map = self._map.to(device)
        self.scale = self.scale.to(device)
        self.model.text_tower.to("cpu")  # has said all it is asked
        if self.images is not None:
            self.model.place_trunk("cpu")
        return True

    def refuse_damage(self) -> None:
        """As `Rows.refuse_damage`."""
        for kept in (self.texts, self.images):
            if kept is not None:
                kept.refuse_damage()

    def _some_texts(self) -> Iterator[torch.Tensor]:
        yield self.texts.rows(torch.arange(min(_LOOKED_AT, len(self.texts.texts))))

    def _some_images(self) -> Iterator[torch.Tensor]:
        ids = self.store.image_ids[:_LOOKED_AT]
        if self.images is not None:
            whole = [number for number in range(len(ids)) if number not in self.damaged]
            yield self._projected(torch.tensor(whole), 0).cpu()
            return
        with evaluating(self.model, self.model.device), self.autocast():
            read = self.store.image_view
            for part in iterate_images(self.model, ids, read, batch_size=64, on_fault=lambda place, fault: None):
                yield part[part.isfinite().all(1)]

    @torch.no_grad()
    def _projected(self, image_keys: torch.Tensor, epoch: int) -> torch.Tensor:
        assert self.images is not None
        trunk = to_device(self.images.rows(image_keys, epoch), self.model.device)
        with self.autocast():
            return F.normalize(self.model.image_tower.project(trunk.to(self.model.dtype)).float(), dim=1)

    def _mapped(self, features: torch.Tensor) -> torch.Tensor:
        return features if self._map is None else F.normalize(features @ self._map, dim=1)

    def rows(self, pairs: torch.Tensor, image_keys: torch.Tensor, epoch: int) -> dict[str, torch.Tensor]:
        """On the device, what a batch gets beside its own: `teacher_texts`, and `teacher_images` where they are known before the step."""
        found, images = {"teacher_texts": self.texts_of(pairs)}, self.images_of(image_keys, epoch)
        return found if images is None else found | {"teacher_images": images}

    def texts_of(self, pairs: torch.Tensor) -> torch.Tensor:
        """Unit float32 ``[n, dim]`` of the texts of these pairs, on the device."""
        rows = self.texts.rows(torch.from_numpy(self._text_of[pairs.numpy()]))
        return self._mapped(to_device(rows, self.model.device))

    def images_of(self, image_keys: torch.Tensor, epoch: int) -> torch.Tensor | None:
        """Unit float32 ``[n, dim]`` of these pictures in the view of this epoch; None where `see` is to be asked."""
        return None if self.images is None else self._mapped(self._projected(image_keys, epoch))

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, 3, s, s]`` as the student sees them → unit float32 ``[n, dim]``."""
        with self.autocast():
            return self._mapped(self.model.image_features(at_size(pixels, self.teacher.shape[-2:])))
