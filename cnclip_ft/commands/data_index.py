"""`cnclip-ft data index`: the index of shards that are trained on as they lie, ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_tools.tables import say


def index(
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARDS…", help="A pattern ('tars/{00000..00099}.tar'), a folder of tars or Parquet files, or one."
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Make the index by which shards are read as they lie, or bring it up to date; training and all else would do it by itself.

    Several machines may run it at once: each takes shards that nobody has. Stopped, the same command goes on.

    Example: cnclip-ft data index 'tars/{00000..00099}.tar' --workers 8
    """
    from data_tools.errors import RequestError
    from data_tools.shards import ShardSource, open_pairs
    from data_tools.words import many

    for place in shards:
        source = open_pairs(place, workers=workers)
        if not isinstance(source, ShardSource):
            raise RequestError(f"{place} is a store, which needs no index")
        about = (
            f"{many(len(source.files), 'shard')}, {many(source.image_count, 'picture')}, {many(len(source), 'pair')}"
        )
        say(f"{place}: {about}; index in {source.folder.parent}")
        for note in source.notes:
            say(f"  {note}")
