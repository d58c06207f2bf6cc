"""Pictures by their ids: read, decoded in worker processes, and brought in batches; one that cannot be used is told, not raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cnclip_ft.models.contract import Preprocessing
from cnclip_ft.runtime import from_workers, start_worker
from data_tools.errors import DataFault
from data_tools.pictures import MISSING

Fault = dict[str, Any]  # `DataFault.as_dict`: an exception would end the batch, and lose its id between processes


def data_fault(fault: Fault) -> DataFault:
    """The exception again."""
    rest = dict(fault)
    return DataFault(rest.pop("problem"), item_id=rest.pop("id"), **rest)


class Pictures(Dataset):
    """Position among `ids` → pixels uint8 `preprocessing.shape`, or why there are none.

    Args:
        read: gives a picture's encoded bytes, or its path, for an id; it may be sent to other processes.
        reduced: as in `Preprocessing.decode`.
    """

    def __init__(
        self, ids: Sequence[Any], read: Callable[[Any], Any], preprocessing: Preprocessing, *, reduced: bool = False
    ) -> None:
        self.ids, self.read, self.preprocessing, self.reduced = ids, read, preprocessing, reduced

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, Fault | None]:
        image_id = self.ids[index]
        try:
            return self.preprocessing.decode(self.read(image_id), reduced=self.reduced), None
        except DataFault as error:
            fault = error
        except KeyError:
            fault = DataFault("it is gone", mend="Bring it back.", kind=MISSING)
        except OSError as error:
            fault = DataFault(str(error.strerror or error), mend="Bring it back.", kind=MISSING)
        return None, fault.as_dict() | {"id": image_id}

    def batches(
        self, positions: Sequence[Sequence[int]], *, workers: int = 0, pin: bool = False
    ) -> Iterator[tuple[torch.Tensor | None, list[Fault | None]]]:
        """For each list of positions: the pixels ``[usable, …]`` in order (None: not one), and a fault or None each."""
        return from_workers(picture_loader(self, positions, _collate, workers=min(workers, len(positions)), pin=pin))


def _collate(
    samples: list[tuple[torch.Tensor | None, Fault | None]],
) -> tuple[torch.Tensor | None, list[Fault | None]]:
    whole = [pixels for pixels, _ in samples if pixels is not None]
    return (torch.stack(whole) if whole else None), [fault for _, fault in samples]


def in_batches(count: int, size: int) -> list[range]:
    """Positions 0 … `count` − 1 in order, `size` at once."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def picture_loader(
    dataset: Dataset,
    batches: Iterable[Sequence[int]],
    collate: Callable[[Any], Any],
    *,
    workers: int,
    pin: bool,
    ahead: int = 2,
) -> DataLoader:
    """The one loader there is, for `from_workers`; `ahead`: batches a worker makes before they are asked for."""
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type] # torch asks for a Sampler and takes whatever can be walked
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=start_worker,
    )
