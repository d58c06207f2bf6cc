"""Pictures → pixels and features. A damaged one is named and passed over, never fatal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from cnclip_ft.data.pictures import Fault, Pictures, in_batches
from cnclip_ft.features.encode import Meter
from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.runtime import to_device
from cnclip_ft.search.index.listing import Key
from data_tools.pictures import MISSING, PIXEL_LIMIT

UNREAD = "cannot be read"  # begins a fault that may be over next time: rights, a network drive


def uploaded_pixels(data: bytes, preprocessing: Preprocessing, pixel_limit: int = PIXEL_LIMIT) -> torch.Tensor:
    """uint8 `preprocessing.shape` of a picture from a stranger.

    Raises:
        DataFault: no picture of a known format, damaged, or above a limit, which stands before the decoding.
    """
    return preprocessing.decode(data, pixel_limit=pixel_limit)


def _in_words(fault: Fault | None) -> str | None:
    if fault is None:
        return None
    return f"{UNREAD}: {fault['problem']}" if fault["kind"] == MISSING else str(fault["problem"])


def encode_pictures(
    model: DualEncoder,
    keys: Sequence[Key],
    read: Callable[[Key], bytes],
    *,
    batch_size: int,
    workers: int,
    meter: Meter,
) -> Iterator[tuple[list[Key], list[str | None], np.ndarray]]:
    """Batches of keys, their faults (None: whole), and unit float32 ``[whole ones, dim]``; call inside `evaluating`."""
    pictures = Pictures(keys, read, model.image_tower.preprocessing)
    batches = in_batches(len(keys), batch_size)
    at = 0
    for pixels, faults in pictures.batches(batches, workers=workers, pin=model.device.type == "cuda"):
        features = np.empty((0, model.image_tower.output_dim), np.float32)
        if pixels is not None:
            features = model.image_features(to_device(pixels, model.device)).float().cpu().numpy()
        yield list(keys[at : at + len(faults)]), [_in_words(fault) for fault in faults], features
        at += len(faults)
        meter.add(len(faults))
