"""A frozen teacher's features of sentences, computed once by all devices and kept as a memory-mapped array.

The folder is named by a key over everything the numbers depend on (text tower, tokenizer, sentences, precision), as that of a frozen
trunk; building is shared and goes on where it was interrupted (`features.rows`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cnclip_ft.collectives import in_rounds, sum_numbers, together
from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.features.rows import Rows
from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.sums import sum_of
from data_tools.bars import Bar
from data_tools.errors import RequestError

BLOCK = 1024  # sentences computed between two marks
KEY = 1  # raised when anything else decides the features
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
        return model, cls(place, model.image_tower.output_dim, _digest(model), source, trust_import)


def _digest(model: DualEncoder) -> str:
    tower, digest = model.text_tower, sum_of(model.text_tower.state_dict().items())
    digest.update(json.dumps([tower.describe(), model.tokenizer.fingerprint()], sort_keys=True, default=str).encode())
    return digest.hexdigest()


class TeacherFeatures:
    """Unit float32 ``[sentences, width]``, mapped to `dim` where the teacher is of another width.

    The map has no weights to learn: a wider teacher is turned to the principal directions of its features, of which the first
    `dim` are kept; a narrower one gets zeros behind. Both leave angles as they are as far as `dim` numbers can.

    Args:
        folder: where caches lie; this one goes to ``folder/<key>``.
        texts: the sentences the teacher reads, one a row.
        precision: of the autocast it computes in, for the key.
    """

    def __init__(self, folder: Path, teacher: Teacher, texts: Sequence[str], dim: int, precision: str) -> None:
        self.teacher, self.texts, self.dim = teacher, texts, dim
        key = hashlib.sha256(json.dumps([KEY, BLOCK, teacher.digest, precision, list(texts)]).encode()).hexdigest()[:24]
        self.folder = folder / f"teacher-{key}"
        advice = "Free some space, or choose another place with feature_cache=FOLDER"
        self._rows = Rows(self.folder, len(texts), BLOCK, advice=advice)
        self._features: np.ndarray = np.empty((0, teacher.width), np.float32)
        self._map: torch.Tensor | None = None
        self.kept = 1.0  # share of the features' squared length that the map keeps

    @property
    def complete(self) -> bool:
        return self._rows.begun and not self._rows.missing()

    def build(
        self,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager[object]],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compute what is missing, shared over all devices.

        Returns:
            Whether it is complete: where a device was asked to stop it may not be, and is taken up the next time.
        """
        complete = self.complete
        accelerator.wait_for_everyone()  # all have looked before one writes
        if not complete:
            if accelerator.is_main_process and not self._rows.begun:
                self._rows.create(self.teacher.width)
            accelerator.wait_for_everyone()
            missing = self._rows.missing(accelerator.process_index, accelerator.num_processes)
            accelerator.wait_for_everyone()
            bar = Bar(total=sum(map(len, missing)), unit="text", desc="teacher", shown=accelerator.is_main_process)
            model = load(self.teacher.place, source=self.teacher.source, trust_import=self.teacher.trust_import)
            device = accelerator.device
            with together(device), evaluating(model, device), autocast():
                for block in in_rounds(missing, device, asked_to_stop):
                    part = encode_texts(model, self.texts[block.start : block.stop])
                    if not self._rows.has(block):  # else another run was here in the meantime
                        self._rows.write(block, part.numpy())
                    bar.update(len(block))
            bar.close()
            if sum_numbers(float(asked_to_stop()), accelerator.device):
                return False
        self._features = self._rows.read()
        if self.teacher.width != self.dim:
            self._map = principal_map(torch.from_numpy(np.array(self._features[:_MOST])), self.dim)
            mapped = torch.from_numpy(np.array(self._features[:_MOST])) @ self._map
            self.kept = float(mapped.square().sum(1).mean())
        return True

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Unit float32 ``[n, dim]`` of these sentences."""
        found = torch.from_numpy(self._features[numbers.numpy()])
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
