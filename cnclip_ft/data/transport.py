"""Pictures from worker to training process through a few blocks of shared memory that are used again and again.

A fresh block costs a page fault for every 4 KiB, which takes many times as long as the copy itself. Beside them a worker
sends the numbers of the pairs, as an array: between processes a tensor takes a file of shared memory and a connection
of its own. Texts and keys are looked up where they are used. Files that the device decodes are sent as they are, end to end.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from cnclip_ft.data.device_decoding import OnDevice
from cnclip_ft.runtime import from_workers

BLOCK = "block"  # stands in a batch for the pictures a worker put into a block: (number, pictures)
FILES = "files"  # those that the device decodes: (their places in the batch, where each ends, all of them end to end)
SECONDS = "seconds"  # that a batch took where it was made


def _as_it_lies(picture: torch.Tensor) -> torch.Tensor:
    """One picture as its bytes lie in memory."""
    return picture.permute(1, 2, 0) if picture.ndim == 3 else picture


def _as_it_is_seen(pictures: torch.Tensor) -> torch.Tensor:
    """The opposite, for many."""
    return pictures.permute(0, 3, 1, 2) if pictures.ndim == 4 else pictures


class SharedBlocks:
    """`count` blocks for uint8 pictures ``[batch, *shape]``, whose channels lie together where the shape has such.

    A block belongs to one worker. Only that worker marks it taken and only the training process marks it free again, so no
    lock is needed. Memory is used when a block is first filled; the lowest free one is taken, so seldom all of them.
    """

    def __init__(self, count: int, batch: int, shape: tuple[int, ...]) -> None:
        self.shape = (count, batch, *_as_it_lies(torch.empty(shape, device="meta")).shape)
        self.memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(self.shape)))
        self.taken = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def pictures(self, number: int) -> torch.Tensor:
        """The block, uint8, as it lies: ``[batch, rows, columns, 3]``."""
        return self.memory.view(self.shape)[number]

    def claim(self) -> int | None:
        """In a worker: the number of a free block of its own; None when all are in use."""
        worker = get_worker_info()
        assert worker is not None
        for number in range(worker.id, self.shape[0], worker.num_workers):
            if not self.taken[number]:
                self.taken[number] = 1
                return number
        return None

    def take(self, number: int, pictures: int, pin: bool) -> torch.Tensor:
        """In the training process: uint8 ``[pictures, *shape]``; the block is free when no tensor shows it any more."""
        block = self.pictures(number)[:pictures]
        if pin:
            pinned = block.pin_memory()
            self.taken[number] = 0
            return _as_it_is_seen(pinned)
        array = block.numpy()
        weakref.finalize(array, self.taken.__setitem__, number, 0)
        return _as_it_is_seen(torch.from_numpy(array))  # whoever shares its memory keeps `array` alive


class Collate:
    """Samples → what travels: the numbers of the pairs, the pictures or their block, and what was wrong with others."""

    def __init__(self, blocks: SharedBlocks | None = None) -> None:
        self.blocks = blocks

    def __call__(self, samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()  # samples are made one by one while they are walked
        number: int | None = None
        pairs: list[int] = []
        pictures: list[torch.Tensor] = []
        decoded = 0
        files: list[bytes] = []
        places: list[int] = []
        faults = []
        for sample in samples:
            if "pixels" in sample:
                if not decoded and self.blocks is not None:
                    number = self.blocks.claim()
                picture = _as_it_lies(sample["pixels"])
                if self.blocks is None or number is None:
                    pictures.append(picture)
                else:
                    self.blocks.pictures(number)[decoded] = picture
                decoded += 1
            elif "file" in sample:
                files.append(sample["file"])
                places.append(len(pairs))
            pairs.append(sample["pair"])
            if sample["fault"]:
                faults.append(sample["fault"])
        batch: dict[str, Any] = {"pairs": np.array(pairs, dtype=np.int64), "faults": faults}
        if number is not None:
            batch[BLOCK] = (number, decoded)
        elif pictures:
            batch["pixels"] = _as_it_is_seen(torch.stack(pictures))
        if files:
            ends = np.cumsum([len(file) for file in files])
            batch[FILES] = (np.array(places), ends, np.frombuffer(b"".join(files), np.uint8))
        return batch | {SECONDS: time.perf_counter() - began}


class Batches:
    """What a `DataLoader` brings, with the pictures taken out of their blocks, and beside them `texts` of the pairs.

    Args:
        on_device: decodes the files of a batch; None where there are none.
    """

    def __init__(
        self,
        loader: DataLoader,
        texts: Callable[[np.ndarray], dict[str, torch.Tensor]],
        blocks: SharedBlocks | None,
        pin: bool,
        on_device: OnDevice | None = None,
    ) -> None:
        self.loader, self.texts, self.blocks, self.pin, self.on_device = loader, texts, blocks, pin, on_device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Generator[dict[str, Any]]:
        for batch in from_workers(self.loader):
            if self.blocks is not None and BLOCK in batch:
                number, count = batch.pop(BLOCK)
                batch["pixels"] = self.blocks.take(number, count, self.pin)
            if self.on_device is not None and FILES in batch:
                places, ends, together = batch.pop(FILES)
                files = np.split(together, ends[:-1])
                batch["pixels"], faults = self.on_device(batch["pairs"], files, places, batch.get("pixels"))
                batch["faults"] += faults
            texts = self.texts(batch.pop("pairs"))
            yield batch | {name: tensor.pin_memory() if self.pin else tensor for name, tensor in texts.items()}
