"""The official folder as it is: ``DATAPATH/datasets/<set>/lmdb/<split>`` and ``DATAPATH/pretrained_weights/<file>.pt``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from data_tools.shards import is_pairs

WEIGHTS = "pretrained_weights"


def split_in(place: str, split: str) -> Path:
    """The store (or shards) of a split, where `place` is the folder of a data set with its stores in ``lmdb/`` or in itself; else `place`."""
    folder = Path(place)
    for inside in (folder / "lmdb" / split, folder / split):
        if is_pairs(inside) and not is_pairs(folder):
            return inside
    return folder


def judged_splits(place: str | Path) -> list[Path]:
    """The stores of a data set's folder that a model is judged on, valid and test; of any other place itself."""
    inside = [split_in(str(place), split) for split in ("valid", "test")]
    return [found for found in inside if found != Path(place)] or [Path(place)]


def weights_beside(start: Any, train: Iterable[str]) -> Any:
    """`start`, or the file of that published name in the folder of weights beside the ``datasets`` that a store of `train` lies in."""
    architecture = ARCHITECTURES.get(start) if isinstance(start, str) and not Path(start).exists() else None
    if architecture is None or architecture.file is None:
        return start
    for above in (above for place in train for above in Path(place).absolute().parents):
        file = above.parent / WEIGHTS / architecture.file
        if above.name == "datasets" and file.is_file():
            return str(file)
    return start
