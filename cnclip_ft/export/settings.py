"""What a format's writer is told beside the model and the place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnclip_ft.features.sources import Source


@dataclass(frozen=True)
class ExportSettings:
    """`info`: the checkpoint's history. `dtype`: a name of the writer's `DTYPES`. `calibration`: pictures and texts that
    settle int8 ranges beforehand; None where a format needs none."""

    info: dict[str, Any]
    dtype: str = "float32"
    calibration: Source | None = None
