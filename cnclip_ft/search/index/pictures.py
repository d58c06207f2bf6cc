"""Pictures → pixels and features. A damaged one is named and passed over, never fatal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cnclip_ft.features.encode import Meter
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import decode
from cnclip_ft.runtime import from_workers
from cnclip_ft.search.index.listing import Key
from data_tools.errors import DataFault
from data_tools.pictures import MISSING, PIXEL_LIMIT

UNREAD = "cannot be read"  # begins a fault that may be over next time: rights, a network drive


def uploaded_pixels(data: bytes, size: int, pixel_limit: int = PIXEL_LIMIT) -> torch.Tensor:
    """uint8 ``[3, size, size]`` of a picture from a stranger.

    Raises:
        DataFault: no picture of a known format, damaged, or above a limit, which stands before the decoding.
    """
    return decode(data, size, pixel_limit=pixel_limit)


class _Pictures(Dataset):
    """Position → pixels, or the fault as a message (an exception would end the whole batch)."""

    def __init__(self, keys: Sequence[Key], read: Callable[[Key], bytes], size: int) -> None:
        self.keys, self.read, self.size = keys, read, size

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str | None]:
        try:
            return decode(self.read(self.keys[index]), self.size), None
        except DataFault as error:
            return None, f"{UNREAD}: {error.problem}" if error.kind == MISSING else error.problem
        except KeyError:
            return None, f"{UNREAD}: it is gone"
        except OSError as error:
            return None, f"{UNREAD}: {error.strerror or error}"


def _collate(samples: list[tuple[torch.Tensor | None, str | None]]) -> tuple[torch.Tensor | None, list[str | None]]:
    whole = [pixels for pixels, _ in samples if pixels is not None]
    return (torch.stack(whole) if whole else None), [fault for _, fault in samples]


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
    loader = DataLoader(
        _Pictures(keys, read, model.image_size), batch_size=batch_size, num_workers=min(workers, len(keys)),
        collate_fn=_collate, pin_memory=model.device.type == "cuda",
    )  # fmt: skip
    at = 0
    for pixels, faults in from_workers(loader):
        features = np.empty((0, model.image_tower.output_dim), np.float32)
        if pixels is not None:
            features = model.image_features(pixels.to(model.device, non_blocking=True)).float().cpu().numpy()
        yield list(keys[at : at + len(faults)]), faults, features
        at += len(faults)
        meter.add(len(faults))
