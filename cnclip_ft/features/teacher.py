"""A frozen teacher: where it lies, and its features of sentences, turned to the student's width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cnclip_ft.features.text_features import TextFeatures, text_digest
from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import RequestError

_MOST = 50_000  # sentences whose directions are looked at


@dataclass(frozen=True)
class Teacher:
    """A model whose text features are met. `place` may be a folder, a file or a published name; `digest` tells its text tower from others."""

    place: str
    width: int
    digest: str
    source: str
    trust_import: bool

    @classmethod
    def look(cls, place: str, key: str, source: str, trust_import: bool) -> Teacher:
        """Open it once, for its width and its digest.

        Raises:
            RequestError: naming `key`, the setting: nothing readable is there.
        """
        return cls.opened(place, key, source, trust_import)[1]

    @classmethod
    def opened(cls, place: str, key: str, source: str, trust_import: bool) -> tuple[DualEncoder, Teacher]:
        """`look`, and the model itself."""
        try:
            model = load(place, source=source, trust_import=trust_import)
        except RequestError as error:
            raise RequestError(f"{key}: {error}") from None
        return model, cls(place, model.image_tower.output_dim, text_digest(model), source, trust_import)

    def open(self) -> DualEncoder:
        return load(self.place, source=self.source, trust_import=self.trust_import)


class TeacherFeatures(TextFeatures):
    """Unit float32 ``[sentences, width]`` of the teacher, mapped to `dim` where it is of another width.

    The map has no weights to learn: a wider teacher is turned to the principal directions of its features, of which the first
    `dim` are kept; a narrower one gets zeros behind. Both leave angles as they are as far as `dim` numbers can.

    Args:
        folder, texts, precision: as `TextFeatures` has them.
    """

    def __init__(self, folder: Path, teacher: Teacher, texts: Sequence[str], dim: int, precision: str) -> None:
        digest, width = teacher.digest, teacher.width
        super().__init__(folder, texts, digest=digest, width=width, precision=precision, name="teacher")
        self.teacher, self.dim = teacher, dim
        self._map: torch.Tensor | None = None
        self.kept = 1.0  # share of the features' squared length that the map keeps

    def build(
        self,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager[object]],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """As `compute`, by the teacher."""
        if not self.compute(accelerator, autocast, self.teacher.open, asked_to_stop):
            return False
        if self.teacher.width != self.dim:
            found = torch.from_numpy(np.array(self._features[:_MOST]))
            if not found.isfinite().all():  # which have no directions
                self.refuse_damage()
            self._map = principal_map(found, self.dim)
            mapped = found @ self._map
            self.kept = float(mapped.square().sum(1).mean())
        return True

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Unit float32 ``[n, dim]`` of these sentences."""
        found = super().rows(numbers)
        return found if self._map is None else F.normalize(found @ self._map, dim=1)


def principal_map(features: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 ``[width, dim]`` with orthonormal columns (rows, where `dim` is larger): see `TeacherFeatures`.

    The sign of a direction is that of its largest part, so that every device finds the same map.
    """
    width = features.shape[1]
    if dim >= width:
        return torch.eye(width, dim)
    moments = features.double().T @ features.double()
    directions = torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).float()
