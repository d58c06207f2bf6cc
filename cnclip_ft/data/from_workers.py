"""What a `DataLoader` brings, with the errors of its worker processes as they were raised there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from data_tools.errors import UserError

_OURS = re.compile(r"\n(?:data_tools|cnclip_ft)[\w.]*\.(\w+): (.*)\Z", re.DOTALL)


def from_workers(loader: DataLoader) -> Iterator[Any]:
    """Batches of `loader`.

    Raises:
        UserError: with its message alone, where torch would send the traceback of the worker as text.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (UserError, RuntimeError, TypeError) as error:
            ours = _OURS.search(str(error)) if str(error).startswith("Caught ") else None
            if ours is None:
                raise
            raise UserError(ours[2].strip()) from None
        yield batch
