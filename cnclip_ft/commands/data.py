"""`cnclip-ft data`: files → stores, what is in them, how they look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.building import Building, Threads, comma_list, interruptible, refuse_targets
from cnclip_ft.commands.data_curate import curate
from cnclip_ft.commands.data_export import export
from cnclip_ft.commands.data_import import import_
from cnclip_ft.commands.options import Where, spread
from data_tools.tables import say

if TYPE_CHECKING:
    from data_tools.parallel import ParallelTexts
    from data_tools.store import PairStore

app = typer.Typer(help="Build, import, check and look at image-text data.", no_args_is_help=True, rich_markup_mode=None)

Stores = Annotated[list[Path], typer.Argument(metavar="STORE…", help="<dir>/<split>, or a folder of splits.")]


@app.command()
@spread
def build(
    *,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Holds {split}_imgs.tsv and {split}_texts.jsonl.")
    ] = None,
    splits: Annotated[str, typer.Option(help="Splits, separated by commas.")] = "",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", "--data_dir", help="DIR, as the official script calls it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--lmdb-dir", "--lmdb_dir", help="Stores go to OUTPUT/<split>; default: DIR."),
    ] = None,
    building: Building,
) -> None:
    """Build stores from the official TSV + JSONL.

    Example: cnclip-ft data build my-data --splits train,valid
    """
    from data_tools.build import build_split
    from data_tools.errors import RequestError
    from data_tools.sources.official import OfficialSource

    folder = folder or data_dir
    if folder is None or not comma_list(splits):
        raise RequestError("name the folder and the splits: cnclip-ft data build DIR --splits train,valid")
    options = building.arguments()
    targets = {split: (output or folder) / split for split in comma_list(splits)}
    for split in targets:
        OfficialSource(folder, split).open()  # all of them are there, before the first is built
    files = [
        file for split in targets for file in vars(OfficialSource(folder, split)).values() if isinstance(file, Path)
    ]
    refuse_targets(targets.values(), files, building, inside=False)
    for split, target in targets.items():
        with interruptible():
            report = build_split(folder, split, target, **options)
        say("\n".join(report.lines()))


app.command("import")(import_)
app.command("export")(export)
app.command("curate")(curate)


def _open_splits(places: list[Path]) -> dict[str, PairStore]:
    """Stores by a name each; a folder of splits gives all of them."""
    from data_tools.errors import RequestError
    from data_tools.store import is_store, open_store, stores_below

    stores: dict[str, PairStore] = {}
    for place in places:
        for path in [place] if is_store(place) else stores_below(place) or [place]:
            store = open_store(path, sample=False)  # all of it is compared
            name = path.name if path.name not in stores else str(path)
            if name in stores:
                raise RequestError(f"{path} is named twice")
            store.name = name
            stores[name] = store
    return stores


@app.command()
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

    from cnclip_ft.models.build import read_tokenizer
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


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Gets the source files and the stores train and valid.")
    ],
    train: Annotated[int, typer.Option(help="Scenes to train on.")] = 2000,
    valid: Annotated[int, typer.Option(help="Scenes held out: combinations that training never shows.")] = 400,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a demonstration set that is there.")] = False,
) -> None:
    """Draw a captioned demonstration set: shapes, colours, positions, in Chinese and English.

    Example: cnclip-ft data demo demo/data
    """
    from data_tools.scenes.writing import SIZE, draw_demo
    from data_tools.store import open_store

    draw_demo(folder, train=train, valid=valid, seed=seed, size=SIZE if size is None else size, overwrite=overwrite)
    for split in ("train", "valid"):
        store = open_store(folder / split)
        say(f"{store.path}: {store.image_count:,} scenes, {len(store):,} pairs")


@app.command()
def show(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="<dir>/<split>.")],
    output: Annotated[Path, typer.Option(help="The PNG.")] = Path("contact-sheet.png"),
    columns: Annotated[int, typer.Option(help="Pictures across.")] = 6,
    rows: Annotated[int, typer.Option(help="Pictures down.")] = 4,
    seed: Annotated[int, typer.Option(help="Which random pairs.")] = 0,
    first: Annotated[bool, typer.Option("--first", help="The first pairs instead of random ones.")] = False,
    where: Where = None,
    font: Annotated[Path | None, typer.Option(help="A .ttf, .ttc or .otf with the glyphs of the captions.")] = None,
) -> None:
    """Draw a contact sheet: pictures with their captions, and in grey what else is kept of them.

    Of parallel text, which has no pictures, rows are printed, --rows of them.

    Example: cnclip-ft data show DIR/train --output sheet.png
    """
    from data_tools.columns import parse_where
    from data_tools.contact_sheet import draw_sheet, is_sheet
    from data_tools.outputs import refuse_files
    from data_tools.parallel import is_parallel, read_parallel
    from data_tools.store import open_store

    opened = open_store(store)
    if is_parallel(opened):
        _show_rows(read_parallel(opened), rows, None if first else seed)
        return
    refuse_files([(output, is_sheet, "a contact sheet of `data show`")], [store])
    count = draw_sheet(
        opened,
        output,
        columns=columns,
        rows=rows,
        seed=None if first else seed,
        font=font,
        where=parse_where(where or ()),
    )
    say(f"{output}: {count} pairs")


def _show_rows(texts: ParallelTexts, count: int, seed: int | None) -> None:
    """Rows of parallel text as a table: the first ones, or random ones in their order."""
    import random

    from data_tools.tables import table, terminal_width

    count = min(count, len(texts))
    chosen = range(count) if seed is None else sorted(random.Random(seed).sample(range(len(texts)), count))
    languages = list(texts.languages)
    cells = [[str(number), *(texts.rows[number].get(language, "–") for language in languages)] for number in chosen]
    say(table(["row", *languages], cells, text=range(len(languages) + 1), width=terminal_width()))
