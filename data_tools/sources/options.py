"""What may be said of a source when it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from data_tools.sources.column_names import Columns
from data_tools.text_files import AUTO


@dataclass(frozen=True)
class SourceOptions:
    """What a source may be told beyond its place; None and empty mean: find it yourself."""

    captions: Path | None = None
    images: Path | None = None
    captions_from: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)
    encoding: str = AUTO
    header: bool = True
    allow_outside: bool = False
    names: Path | None = None
    box_format: str = ""
