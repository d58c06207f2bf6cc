"""Arrays as files that are never whole in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

import numpy as np


def write_array(file: IO[bytes], blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array ``.npy`` of blocks one behind the other, which are never all in memory."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(np.ascontiguousarray(block, dtype).data)
