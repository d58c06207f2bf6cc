"""A frozen image trunk's features, computed once and kept as a memory-mapped array.

What is kept is the trunk's output before the visual projection, so that the projection may still train. The folder
is named by a key over everything the numbers depend on (trunk weights, transform, augmentation, precision, data), so
a later run with the same trunk and data reads it, and a changed one never does. Building goes on where it was
interrupted: finished blocks are marked one by one, after their features reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cnclip_ft.data.augment import augment
from cnclip_ft.data.pictures import Pictures, data_fault, in_batches
from cnclip_ft.models.build import describe_image
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import DECODER
from cnclip_ft.recipe import Augmentation
from data_tools.atomic import whole_file
from data_tools.errors import RequestError, UserError
from data_tools.lock import FileLock
from data_tools.store import PairStore

BLOCK = 256  # images computed between two marks
KEY = 2  # raised when anything else decides the features, the decoding for one: caches made before are not found


def cache_key(
    model: DualEncoder, store: PairStore, views: int, setting: Augmentation, precision: str, seed: int, reduced: bool
) -> str:
    """Hex digest over all that decides the features."""
    tower = model.image_tower
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        if not name.startswith("visual_projection"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    drawn = [setting.model_dump(), views, seed, BLOCK] if setting.changes else None
    *picture, resize = tower.preprocessing.describe().values()
    # Equal weights compute other features with other heads or another activation.
    transform = [describe_image(tower), *picture, f"{resize}-reduced" if reduced else resize, DECODER, precision]
    # A row's place is that of its image; `checksum` does not tell in which order images lie.
    rows = hashlib.sha256(json.dumps(store.image_ids).encode()).hexdigest()
    digest.update(json.dumps([KEY, transform, drawn, store.checksum(), rows]).encode())
    return digest.hexdigest()[:24]


class FeatureCache:
    """Features float32 ``[views, images, width]``; `rows(image_keys, epoch)` gives a batch's.

    Args:
        folder: where caches lie; this one goes to ``folder/<key>``.
    """

    def __init__(self, folder: Path, model: DualEncoder, store: PairStore, *, views: int, augment: Augmentation,
                 precision: str, seed: int, reduced: bool) -> None:  # fmt: skip
        self.model, self.store, self.views, self.augment, self.seed = model, store, views, augment, seed
        self.reduced = reduced
        self.folder = folder / cache_key(model, store, views, augment, precision, seed, reduced)
        self.count = len(store.image_ids)
        self.blocks = -(-self.count // BLOCK)
        self._features: np.memmap | None = None

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").is_file()

    def build(self, accelerator, autocast, *, images_at_once: int = 64, workers: int = 0, max_damaged: int = 0) -> None:
        """Compute what is missing, shared over all devices; `autocast` makes the context the trunk computes in."""
        if not self.complete:
            self._prepare(accelerator)
            self._fill(accelerator, autocast, images_at_once, workers, max_damaged)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                note = {"images": self.count, "views": self.views, "store": str(self.store.path)}
                with whole_file(self.folder / "complete.json", "w") as file:
                    json.dump(note, file)
            accelerator.wait_for_everyone()
        self._features = self._open("features.npy", "r")

    @property
    def damaged(self) -> set[int]:
        """Keys of the images that could not be decoded: their rows are worth nothing."""
        files = sorted(self.folder.glob("damaged-*.jsonl"))
        return {int(line) for file in files for line in file.read_text(encoding="utf-8").split()}

    def _prepare(self, accelerator) -> None:
        if accelerator.is_main_process and not (self.folder / "done.npy").is_file():
            with torch.inference_mode():
                shape = self.model.image_tower.preprocessing.shape
                blank = torch.zeros(1, *shape, dtype=torch.uint8, device=self.model.device)
                width = self.model.image_trunk(blank).shape[1]
            self.folder.mkdir(parents=True, exist_ok=True)
            # Runs that begin together share these arrays: each computes what is missing, and all write the same numbers.
            with _one_at_a_time(self.folder / "cnclip-ft.lock"):
                if not (self.folder / "done.npy").is_file():
                    _new_array(self.folder / "features.npy", (self.views, self.count, width), np.float32)
                    # Written last: its presence says that both arrays have their full size.
                    _new_array(self.folder / "done.npy", (self.views, self.blocks), np.uint8)
        accelerator.wait_for_everyone()

    def _open(self, name: str, mode: str) -> np.memmap:
        try:
            array = np.load(self.folder / name, mmap_mode="r")  # to be written, one cut short would be filled up
            if array.shape[:2] != (self.views, self.count if name == "features.npy" else self.blocks):
                raise ValueError(f"an array of {array.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{self.folder / name} cannot be used ({getattr(error, 'strerror', None) or error}). "
                f"Remove {self.folder}: its features are computed again"
            ) from None
        return array if mode == "r" else np.load(self.folder / name, mmap_mode=mode)

    def _fill(self, accelerator, autocast, images_at_once: int, workers: int, max_damaged: int) -> None:
        features, done = self._open("features.npy", "r+"), self._open("done.npy", "r+")
        missing = [(int(v), int(b)) for v, b in zip(*np.nonzero(done == 0), strict=True)]
        accelerator.wait_for_everyone()  # a device that looked later would see other blocks missing, and take others
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        preprocessing = self.model.image_tower.preprocessing
        pictures = Pictures(self.store.image_ids, self.store.image_view, preprocessing, reduced=self.reduced)
        blocks = in_batches(self.count, BLOCK)
        asked = [blocks[block] for _, block in mine]
        damaged: dict[int, str] = {}
        hidden = None if accelerator.is_main_process else True
        bar = tqdm(total=len(mine) * BLOCK, unit="image", desc="frozen image features", disable=hidden)
        for (view, block), (whole, told) in zip(mine, pictures.batches(asked, workers=workers), strict=True):
            pixels = torch.zeros(len(told), *preprocessing.shape, dtype=torch.uint8)
            if whole is not None:
                pixels[[fault is None for fault in told]] = whole
            faults = {
                block * BLOCK + row: f"{self.store.path}: image {fault['id']!r}: {data_fault(fault | {'id': None})}"
                for row, fault in enumerate(told)
                if fault is not None
            }
            damaged |= faults
            if len(damaged) > max_damaged:
                raise UserError(
                    f"{len(damaged)} images cannot be decoded, the last: {list(damaged.values())[-1]}\n"
                    "Mend the data (`cnclip-ft data check`) or raise data.max_damaged_images."
                )
            if not done[view, block]:  # else another run was here in the meantime
                computed = self._compute(autocast, view, block, pixels, images_at_once)
                features[view, block * BLOCK : block * BLOCK + len(pixels)] = computed
                features.flush()
                if faults:
                    notes = self.folder / f"damaged-{accelerator.process_index}.jsonl"
                    with open(notes, "a", encoding="utf-8") as file:
                        file.writelines(json.dumps(key) + "\n" for key in faults)
                done[view, block] = 1
            bar.update(len(pixels))
        done.flush()
        bar.close()

    @torch.inference_mode()
    def _compute(self, autocast, view: int, block: int, pixels: torch.Tensor, at_once: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + view) * 1_000_003 + block) % 2**63)
        parts = []
        for part in pixels.split(at_once):
            part = augment(part.to(self.model.device), self.augment, generator)
            with autocast():
                parts.append(self.model.image_trunk(part).float().cpu())
        return torch.cat(parts).numpy()

    def rows(self, image_keys: torch.Tensor, epoch: int) -> torch.Tensor:
        """Float32 ``[n, width]`` of these images, in the view of this epoch."""
        return torch.from_numpy(self._features[epoch % self.views, image_keys.numpy()])


def _new_array(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    beside = path.with_suffix(".new")
    try:
        array = np.lib.format.open_memmap(beside, mode="w+", dtype=dtype, shape=shape)
        array.flush()
        del array
        if hasattr(os, "posix_fallocate"):  # a full disk is said here; met while writing it would end the process
            with open(beside, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{path}: features of {math.prod(shape) * np.dtype(dtype).itemsize:,} bytes cannot be kept there "
            f"({error.strerror or error}). Free some space, or choose another place with feature_cache=FOLDER"
        ) from None


@contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Waits for the processes that hold `file`; what is done inside takes moments."""
    while True:
        try:
            lock = FileLock(file, "preparing these features")
            break
        except RequestError:
            time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()
