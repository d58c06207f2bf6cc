"""Encoding shared by all devices: each takes every W-th batch, and all get all features.

The batches are those of one process (`features.encode`), so the features are its to the bit where the devices are alike.
Every method is collective; an error on one device reaches the others where the caller is inside
`collectives.together`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from cnclip_ft.collectives import in_turns, rank, world_size
from cnclip_ft.data.pictures import Pictures, in_batches
from cnclip_ft.features.encode import (
    Meter,
    SplitFeatures,
    SplitTexts,
    encode_batch,
    evaluating,
    iterate_images,
    named,
    sound,
    text_batches,
)
from cnclip_ft.features.frozen_trunk import trunk_weights
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.runtime import to_device


class SharedEncoder:
    """One model, for as long as its weights stay.

    Args:
        workers: processes of this device that decode pictures.
        autocast: makes the context the towers compute in.
        trunk: where the image trunk stays as it is, keeps its features ``[n, width]`` by the name of the pictures:
            they are computed at the first question and only projected from then on.
        check: called between two batches; what it raises ends the work on all devices.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        workers: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        trunk: dict[str, torch.Tensor] | None = None,
        batch_size: int = 128,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.workers, self.autocast, self.trunk = model, workers, autocast, trunk
        self.batch_size, self.check = batch_size, check

    def split(self, name: str, split: SplitTexts, read: Callable[[Any], Any]) -> SplitFeatures:
        """All pictures and texts of a split; `name` tells its pictures from others.

        Raises:
            DataFault: a picture cannot be decoded.
        """
        images = self.images(name, split.image_ids, read)
        return SplitFeatures(**vars(split), image_features=images, text_features=self.texts(split.texts))

    def images(self, name: str, ids: Sequence[Any], read: Callable[[Any], Any]) -> torch.Tensor:
        """Unit float32 ``[len(ids), dim]`` on the CPU; raises as `split`."""
        if self.trunk is None or name not in self.trunk:
            with self.model.trunk_at_hand():
                computed = self._decoded(ids, read, trunk=self.trunk is not None)
            if self.trunk is None:
                return computed
            self.trunk[name] = computed
        return self._projected(self.trunk[name])

    def looked(
        self,
        ids: Sequence[Any],
        read: Callable[[Any], Any],
        counts: Sequence[int],
        look: Callable[[range, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What is seen in pictures: float32 rows on the CPU, those of all pictures in order.

        Args:
            counts: rows of each picture.
            look: positions of pictures among `ids`, their uint8 pixels on the model's device → float32 ``[rows, width]`` on the CPU.

        Raises:
            DataFault: a picture cannot be decoded.
        """
        parts = in_batches(len(ids), self.batch_size)
        mine = parts[rank() :: world_size()]
        pictures = Pictures(ids, read, self.model.image_tower.preprocessing)
        with self.model.trunk_at_hand(), self._walking(len(ids), "images") as meter:

            def own() -> Iterator[torch.Tensor]:
                walk = pictures.batches(mine, workers=self.workers, pin=self.model.device.type == "cuda")
                for places, (pixels, faults) in zip(mine, walk, strict=True):
                    for fault in filter(None, faults):
                        raise named(fault)
                    assert pixels is not None
                    yield look(places, to_device(pixels, self.model.device))

            return self._joined([sum(counts[place] for place in part) for part in parts], own(), meter)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit float32 ``[len(texts), dim]`` on the CPU; texts that read the same are encoded once."""
        batches = list(text_batches(self.model.tokenizer, texts, 2 * self.batch_size))
        features = torch.empty(len(texts), self.model.image_tower.output_dim)
        own = (encode_batch(self.model, batch) for batch in batches[rank() :: world_size()])
        with self._walking(len(texts), "texts") as meter:
            pieces = in_turns([len(batch.ids) for batch in batches], own, self.model.device)
            for batch, part in zip(batches, pieces, strict=True):
                features[batch.places] = part[batch.rows]
                meter.add(len(batch.rows))
                self.check()
        return features

    def _decoded(self, ids: Sequence[Any], read: Callable[[Any], Any], trunk: bool) -> torch.Tensor:
        batches = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        mine = [image_id for batch in batches[rank() :: world_size()] for image_id in batch]
        with self._walking(len(ids), "images") as meter:
            # Only the last batch may be short, and whoever has it has it last: so the loader cuts the same batches.
            own = iterate_images(self.model, mine, read, batch_size=self.batch_size, workers=self.workers, trunk=trunk)
            return self._joined([len(batch) for batch in batches], own, meter)

    def _projected(self, kept: torch.Tensor) -> torch.Tensor:
        def own() -> Iterator[torch.Tensor]:
            for part in parts[rank() :: world_size()]:
                pushed = self.model.image_tower.project(to_device(part, self.model.device).to(self.model.dtype))
                yield sound(F.normalize(pushed.float(), dim=1).cpu(), "image")

        parts = kept.split(self.batch_size)
        with self._walking(len(kept), "images") as meter:
            return self._joined([len(part) for part in parts], own(), meter)

    def _joined(self, sizes: list[int], own: Iterator[torch.Tensor], meter: Meter) -> torch.Tensor:
        parts = []
        for part in in_turns(sizes, own, self.model.device):
            parts.append(part)
            meter.add(len(part))
            self.check()
        return torch.cat(parts)

    @contextmanager
    def _walking(self, total: int, name: str) -> Iterator[Meter]:
        meter = Meter(total, name, wanted=rank() == 0)
        try:
            with evaluating(self.model), self.autocast():
                yield meter
        finally:
            meter.close()


def trunk_digest(model: DualEncoder) -> str:
    """Hex digest of all that decides an image trunk's features of given pictures, but the number format."""
    tower, digest = model.image_tower, trunk_weights(model.image_tower)
    digest.update(json.dumps([tower.describe(), tower.preprocessing.describe()], sort_keys=True).encode())
    return digest.hexdigest()
