"""A Hugging Face `imagefolder`: ``metadata.{csv,jsonl,parquet}`` with ``file_name`` and a caption, per split or at the top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_tools.errors import RequestError
from data_tools.items import Source
from data_tools.sources.column_names import Columns
from data_tools.sources.table import TableSource
from data_tools.text_files import AUTO
from data_tools.walk import is_hidden

_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {"train": "train", "validation": "valid", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}


def imagefolder(
    source: Path, columns: Columns | None = None, encoding: str = AUTO, outside: bool = False
) -> dict[str, Source]:
    """Its splits by our names (``validation`` is ``valid``); one nameless split where the metadata lie at the top.

    Raises:
        RequestError: no metadata, or two folders for one split.
    """
    if not source.is_dir():
        raise RequestError(f"{source}: no such folder")
    columns = columns or Columns()
    if columns.image is None:
        columns = replace(columns, image="file_name")

    def table(file: Path) -> TableSource:
        own = encoding if file.suffix != ".parquet" else AUTO
        return TableSource(file, columns=columns, encoding=own, outside=outside)

    top = _metadata(source)
    if top is not None:
        return {"": table(top)}
    splits: dict[str, Source] = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not is_hidden(path.name)):
        metadata = _metadata(folder)
        if metadata is not None:
            name = _SPLITS.get(folder.name.lower(), folder.name)
            if name in splits:
                raise RequestError(f"{source}: two folders for split {name!r}")
            splits[name] = table(metadata)
    if not splits:
        raise RequestError(
            f"{source}: no {', '.join(_NAMES)} at the top or one folder down; captions have to be in one of them"
        )
    return splits


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)
