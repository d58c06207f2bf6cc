"""A text tower's features of sentences, computed once by all devices and kept as a memory-mapped array.

The folder is named by a key over everything the numbers depend on (text tower, tokenizer, sentences, precision), as that of a frozen
image trunk; building is shared and goes on where it was interrupted (`features.rows`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cnclip_ft.collectives import in_rounds, of_first, sum_numbers, together
from cnclip_ft.data.mixture import Mixture
from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.features.rows import Rows
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.sums import sum_of
from data_tools.bars import Bar
from data_tools.store import PairSource

BLOCK = 1024  # sentences computed between two marks
KEY = 1  # raised when anything else decides the features


def text_digest(model: DualEncoder) -> str:
    """Tells a text tower with its tokenizer from others."""
    tower, digest = model.text_tower, sum_of(model.text_tower.state_dict().items())
    digest.update(json.dumps([tower.describe(), model.tokenizer.fingerprint()], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def distinct_texts(store: PairSource | Mixture) -> tuple[list[str], np.ndarray]:
    """Every text once, in the order first met, and int64 ``[pairs]``: which of them a pair has."""
    numbers: dict[str, int] = {}
    of_pairs = np.fromiter(
        (numbers.setdefault(pair.text, len(numbers)) for pair in store.pairs()), np.int64, len(store)
    )
    return list(numbers), of_pairs


class TextFeatures:
    """Unit float32 ``[sentences, width]``.

    Args:
        folder: where caches lie; this one goes to ``folder/<name>-<key>``.
        texts: the sentences, one a row.
        digest: of the tower, `text_digest`.
        width: of its features.
        precision: of the autocast it computes in, for the key.
        name: whose they are, for the folder and the bar.
    """

    def __init__(
        self, folder: Path, texts: Sequence[str], *, digest: str, width: int, precision: str, name: str = "texts"
    ) -> None:
        self.texts, self.width, self.name = texts, width, name
        key = hashlib.sha256(json.dumps([KEY, BLOCK, digest, precision, list(texts)]).encode()).hexdigest()[:24]
        self.folder = folder / f"{name}-{key}"
        advice = "Free some space, or choose another place with feature_cache=FOLDER"
        self._rows = Rows(self.folder, len(texts), BLOCK, advice=advice)
        self._features: np.ndarray = np.empty((0, width), np.float32)

    @property
    def complete(self) -> bool:
        return self._rows.begun and not self._rows.missing()

    def compute(
        self,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager[object]],
        opened: Callable[[], DualEncoder],
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Compute what is missing, shared over all devices.

        Args:
            opened: gives the model, where anything is missing.

        Returns:
            Whether it is complete: where a device was asked to stop it may not be, and is taken up the next time.
        """
        if not of_first(self.complete):  # another run may end between two looks
            if accelerator.is_main_process and not self._rows.begun:
                self._rows.create(self.width)
            accelerator.wait_for_everyone()
            missing = self._rows.missing(accelerator.process_index, accelerator.num_processes)
            bar = Bar(total=sum(map(len, missing)), unit="text", desc=self.name, shown=accelerator.is_main_process)
            model, device = opened(), accelerator.device
            with together(device), evaluating(model, device), autocast():
                for block in in_rounds(missing, device, asked_to_stop):
                    part = encode_texts(model, self.texts[block.start : block.stop])
                    if not self._rows.has(block):  # else another run was here in the meantime
                        self._rows.write(block, part.numpy())
                    bar.update(len(block))
            bar.close()
            if sum_numbers(float(asked_to_stop()), accelerator.device):
                return False
        self._features = self._rows.read(self.width)
        return True

    def refuse_damage(self) -> None:
        """As `Rows.refuse_damage`."""
        self._rows.refuse_damage()

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Unit float32 ``[…, width]`` of these sentences."""
        return torch.from_numpy(self._features[numbers.numpy()])


class PairTexts:
    """What a text tower that stays as it is says of the texts of a store's pairs.

    Args:
        folder: where caches lie.
        model: with the weights that stay, on its device.
    """

    def __init__(self, folder: Path, model: DualEncoder, store: PairSource | Mixture, precision: str) -> None:
        texts, self._text_of = distinct_texts(store)
        self._model, width = model, model.image_tower.output_dim
        self.features = TextFeatures(folder, texts, digest=text_digest(model), width=width, precision=precision)

    def build(
        self,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager[object]],
        asked_to_stop: Callable[[], bool],
    ) -> bool:
        """As `TextFeatures.compute`."""
        return self.features.compute(accelerator, autocast, lambda: self._model, asked_to_stop)

    def rows(self, pairs: np.ndarray) -> torch.Tensor:
        """Unit float32 ``[…, dim]`` of the texts of these pairs."""
        return self.features.rows(torch.from_numpy(self._text_of[pairs]))
