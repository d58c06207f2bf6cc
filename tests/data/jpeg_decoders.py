"""A decoder with the interface of a card's, behind which Pillow decodes; and a JPEG that only decoding shows to be damaged."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


class PillowDecoder:
    """`seen`: pictures it was given; `most`: those of one call at most."""

    name = "Pillow"

    def __init__(self) -> None:
        self.seen = self.most = 0

    def __call__(self, files):
        self.seen, self.most = self.seen + len(files), max(self.most, len(files))
        return [self._decoded(file.tobytes()) for file in files]

    @staticmethod
    def _decoded(file: bytes) -> torch.Tensor | None:
        try:
            pixels = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
        except OSError:
            return None
        return torch.from_numpy(pixels).permute(2, 0, 1)


def hurt(file: bytes) -> bytes:
    """A JPEG whose code table means nothing: its header says nothing of that."""
    table = file.index(b"\xff\xc4") + 5
    return file[:table] + b"\xff" * 16 + file[table + 16 :]
