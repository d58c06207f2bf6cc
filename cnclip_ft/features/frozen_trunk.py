"""A frozen image trunk's features, computed once and kept as a memory-mapped array.

What is kept is the trunk's output before the visual projection, so that the projection may still train. The folder
is named by a key over everything the numbers depend on (trunk weights, transform, augmentation, precision, data), so
a later run with the same trunk and data reads it, and a changed one never does. Building is shared and goes on where it
was interrupted (`features.rows`); ``complete.json`` says that nothing is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cnclip_ft.collectives import in_rounds, of_first, sum_numbers, together
from cnclip_ft.data.augment import augment
from cnclip_ft.data.mixture import Mixture, check_lines, name_image
from cnclip_ft.data.pictures import Pictures, data_fault
from cnclip_ft.features.encode import sound
from cnclip_ft.features.rows import Block, Rows
from cnclip_ft.models.contract import ImageTower
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import DECODER
from cnclip_ft.models.sums import sum_of
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.runtime import Fetched, to_device
from data_tools.atomic import whole_file
from data_tools.bars import Bar
from data_tools.errors import UserError
from data_tools.store import PairSource
from data_tools.store.checksum import written

BLOCK = 256  # images computed between two marks
KEY = 2  # raised when anything else decides the features, the decoding for one: caches made before are not found


def trunk_weights(tower: ImageTower) -> hashlib._Hash:
    """sha256 over a trunk's weights, to be told what else decides its features."""
    return sum_of((name, tensor) for name, tensor in tower.state_dict().items() if not tower.in_projection(name))


def cache_key(
    model: DualEncoder,
    store: PairSource | Mixture,
    views: int,
    setting: Augmentation,
    precision: str,
    seed: int,
    reduced: bool,
) -> str:
    """Hex digest over all that decides the features."""
    tower = model.image_tower
    digest = trunk_weights(tower)
    # Without what is null: a key that is new does not hide the caches made before it.
    drawn = [setting.model_dump(exclude_none=True), views, seed, BLOCK] if setting.changes else None
    *picture, resize = tower.preprocessing.describe().values()
    # Equal weights compute other features with other heads or another activation.
    transform = [tower.describe(), *picture, f"{resize}-reduced" if reduced else resize, DECODER, precision]
    # A row's place is that of its image; `checksum` does not tell in which order images lie.
    rows = hashlib.sha256()
    for piece in written(store.image_ids, json.dumps):
        rows.update(piece)
    digest.update(json.dumps([KEY, transform, drawn, store.checksum(), rows.hexdigest()]).encode())
    return digest.hexdigest()[:24]


class FeatureCache:
    """Features float32 ``[views, images, width]``; `rows(image_keys, epoch)` gives a batch's.

    Args:
        folder: where caches lie; this one goes to ``folder/<key>``.
    """

    def __init__(
        self,
        folder: Path,
        model: DualEncoder,
        store: PairSource | Mixture,
        *,
        views: int,
        augment: Augmentation,
        precision: str,
        seed: int,
        reduced: bool,
    ) -> None:
        self.model, self.store, self.views, self.augment, self.seed = model, store, views, augment, seed
        self.reduced = reduced
        self.folder = folder / cache_key(model, store, views, augment, precision, seed, reduced)
        self.count = len(store.image_ids)
        advice = "Free some space, or choose another place with feature_cache=FOLDER"
        self._rows = Rows(self.folder, self.count, BLOCK, views=views, advice=advice)
        self._features: np.ndarray = np.empty((views, 0, 0), np.float32)

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").is_file()

    def build(
        self,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        images_at_once: int = 64,
        workers: int = 0,
        max_damaged: int = 0,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compute what is missing, shared over all devices; `autocast` makes the context the trunk computes in.

        Returns:
            Whether it is complete: where a device was asked to stop it may not be, and is taken up the next time.
        """
        width = self._width()  # asked of the tower here, too: code may have changed where weights have not
        if not of_first(self.complete):  # another run may end between two looks
            if accelerator.is_main_process and not self._rows.begun:
                # Runs that begin together share the array: each computes what is missing, and all write the same numbers.
                self._rows.create(width)
            accelerator.wait_for_everyone()
            missing = self._rows.missing(accelerator.process_index, accelerator.num_processes)
            bar = Bar(
                total=sum(map(len, missing)),
                unit="image",
                desc="frozen image features",
                shown=accelerator.is_main_process,
            )
            with together(accelerator.device):
                self._fill(missing, autocast, images_at_once, workers, max_damaged, bar, asked_to_stop)
            bar.close()
            if sum_numbers(float(asked_to_stop()), accelerator.device):
                return False
            if accelerator.is_main_process:
                note = {"images": self.count, "views": self.views, "store": str(self.store.path)}
                with whole_file(self.folder / "complete.json", "w") as file:
                    json.dump(note, file)
            accelerator.wait_for_everyone()
        self._features = self._rows.read(width)
        return True

    @property
    def damaged(self) -> set[int]:
        """Keys of the images that could not be decoded: their rows are worth nothing."""
        return set(self._rows.faults())

    @torch.inference_mode()
    def _width(self) -> int:
        return self.model.image_trunk(self.model.image_tower.example(1)).shape[1]

    def _fill(
        self,
        missing: list[Block],
        autocast: Callable[[], AbstractContextManager[object]],
        images_at_once: int,
        workers: int,
        max_damaged: int,
        bar: Bar,
        asked_to_stop: Callable[[], bool],
    ) -> None:
        preprocessing = self.model.image_tower.preprocessing
        pictures = Pictures(self.store.image_ids, self.store.image_view, preprocessing, reduced=self.reduced)
        asked = [list(range(block.start, block.stop)) for block in missing]
        damaged: dict[int, str] = {}
        decoded = pictures.batches(asked, workers=workers, pin=self.model.device.type == "cuda")
        for block in in_rounds(missing, self.model.device, asked_to_stop):
            pixels, told = next(decoded)
            if pixels is None or len(pixels) < len(told):
                whole, pixels = pixels, torch.zeros(len(told), *preprocessing.shape, dtype=torch.uint8)
                if whole is not None:
                    pixels[[fault is None for fault in told]] = whole
            damaged |= {
                row: f"{name_image(self.store, fault['id'])}: {data_fault(fault | {'id': None})}"
                for row, fault in enumerate(told, block.start)
                if fault is not None
            }
            if len(damaged) > max_damaged:
                raise UserError(
                    f"{len(damaged)} images cannot be decoded, the last: {list(damaged.values())[-1]}\n"
                    f"Mend the data ({check_lines(self.store)}), or raise the limit: "
                    f"data.max_damaged_images={2 * len(damaged)}"
                )
            if not self._rows.has(block):  # else another run was here in the meantime
                computed = self._compute(autocast, block.view, block.start // BLOCK, pixels, images_at_once)
                sound(computed[torch.tensor([fault is None for fault in told])], "image")
                self._rows.write(block, computed.numpy(), damaged)
            bar.update(len(pixels))

    @torch.inference_mode()
    def _compute(
        self,
        autocast: Callable[[], AbstractContextManager[object]],
        view: int,
        block: int,
        pixels: torch.Tensor,
        at_once: int,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + view) * 1_000_003 + block) % 2**63)
        parts = []
        for part in pixels.split(at_once):
            part = to_device(part, self.model.device)
            part = augment(part, self.augment, generator, self.model.image_tower.preprocessing)
            with autocast():
                parts.append(Fetched(self.model.image_trunk(part).float()))
        return torch.cat([part() for part in parts])

    def refuse_damage(self) -> None:
        """As `Rows.refuse_damage`."""
        self._rows.refuse_damage()

    def rows(self, image_keys: torch.Tensor, epoch: int) -> torch.Tensor:
        """Float32 ``[n, width]`` of these images, in the view of this epoch."""
        return torch.from_numpy(self._features[epoch % self.views, image_keys.numpy()])
