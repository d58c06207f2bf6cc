"""`cnclip-ft data export`: a store, or a part of it, in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.building import comma_list
from cnclip_ft.commands.options import Store, Where
from data_tools.tables import say


def export(
    store: Store,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORM",
            help="webdataset, imagefolder, parquet, tsv (official source files), official (its LMDB) or store (ours).",
        ),
    ],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    where: Where = None,
    languages: Annotated[str, typer.Option(help="Only texts of these languages: zh, en, mixed.")] = "",
    keep_columns: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Kept columns that go along; 'none'. [default: all]")
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures in a tar or Parquet file [5,000], or in a shard of a store [one piece]."),
    ] = None,
) -> None:
    """Write a store in another form, read it back, compare, and only then put it in place.

    Example: cnclip-ft data export DIR/train --to webdataset --output tars

    Example: cnclip-ft data export DIR/train --to official --output clothes --where 类目=女装
    """
    from data_tools.columns import parse_where
    from data_tools.exporting import export_store
    from data_tools.selection import Selection

    columns = None if keep_columns is None else tuple(comma_list("" if keep_columns == "none" else keep_columns))
    chosen = Selection(parse_where(where or ()), tuple(comma_list(languages)), columns)
    done = export_store(store, output, to, chosen=chosen, shard_size=shard_size)
    say(f"{output}: {done.images:,} images, {done.pairs:,} pairs, read back and compared")
    for note in done.notes:
        say(f"  {note}")
