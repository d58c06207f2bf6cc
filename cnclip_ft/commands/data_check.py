"""`cnclip-ft data check`: what is in the data, and what would hurt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.building import Threads

if TYPE_CHECKING:
    from data_tools.store import PairSource

Stores = Annotated[list[Path], typer.Argument(metavar="STORE…", help="<dir>/<split>, or a folder of splits.")]


def _open_splits(places: list[Path]) -> dict[str, PairSource]:
    """Stores by a name each; a folder of splits gives all of them."""
    from data_tools.errors import RequestError
    from data_tools.shards import is_pairs, open_pairs
    from data_tools.store import stores_below

    stores: dict[str, PairSource] = {}
    for place in places:
        for path in [place] if is_pairs(place) else stores_below(place) or [place]:
            store = open_pairs(path, sample=False)  # all of it is compared
            name = store.name if store.name not in stores else str(path)
            if name in stores:
                raise RequestError(f"{path} is named twice")
            store.name = name
            stores[name] = store
    return stores


def check(
    stores: Stores,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with thumbnails.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens a caption may have.")] = 52,
    vocabulary: Annotated[Path | None, typer.Option(help="Another vocab.txt than the packaged one.")] = None,
    language: Annotated[
        str | None, typer.Option(help="Of what is printed and of the page: zh or en. [default: the system's]")
    ] = None,
    decode: Annotated[bool, typer.Option(help="Decode every picture, or read the headers only.")] = True,
    workers: Threads = 2,
) -> None:
    """Say what is in the data and what would hurt training; exit 1 if something would.

    Example: cnclip-ft data check DIR/train DIR/valid --html check.html
    """
    import json

    from cnclip_ft.models.assembly import read_tokenizer
    from data_tools.atomic import whole_file
    from data_tools.check import judge, measure
    from data_tools.check.page import BEGINS, write_page
    from data_tools.check.tables import in_words
    from data_tools.outputs import begins, json_with, refuse_files
    from data_tools.tables import terminal_width
    from data_tools.words import language_of

    said_in = language_of(language)
    opened = _open_splits(stores)
    ours = "a report of `data check`"
    refuse_files(
        [(json_file, json_with("splits", "leakage", "findings"), ours), (html_file, begins(*BEGINS), ours)],
        [store.path for store in opened.values()],
    )
    lengths = read_tokenizer({"context_length": context_length}, vocabulary).lengths
    report = judge(
        [
            measure(store, lengths=lengths, context_length=context_length, decode=decode, workers=workers)
            for store in opened.values()
        ]
    )
    typer.echo(in_words(report, terminal_width(), said_in))
    if json_file is not None:
        with whole_file(json_file, "w") as file:
            json.dump(report.as_dict(), file, ensure_ascii=False, indent=1)
    if html_file is not None:
        write_page(report, opened, html_file, language=said_in)
    if report.hurts:
        raise typer.Exit(1)
