"""`cnclip-ft data`: files → stores, what is in them, how they look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.building import Building, comma_list, interruptible, refuse_targets
from cnclip_ft.commands.data_check import check
from cnclip_ft.commands.data_curate import curate
from cnclip_ft.commands.data_export import export
from cnclip_ft.commands.data_import import import_
from cnclip_ft.commands.data_index import index
from cnclip_ft.commands.data_mine import mine
from cnclip_ft.commands.options import Store, Where, spread
from data_tools.tables import say

if TYPE_CHECKING:
    from data_tools.parallel import ParallelTexts

app = typer.Typer(help="Build, import, check and look at image-text data.", no_args_is_help=True, rich_markup_mode=None)


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
app.command("mine")(mine)
app.command("check")(check)
app.command("index")(index)


@app.command()
def join(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE…", help="All parts of one source, or whole stores.")],
    output: Annotated[
        Path, typer.Option(metavar="LIST", help="The description: a .yaml that commands take for a store.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a description that is there.")] = False,
) -> None:
    """Write a description over stores that are one data set; nothing is copied.

    Example: cnclip-ft data join DIR/part-1 DIR/part-2 --output DIR/train.yaml
    """
    from data_tools.joining import join as join_stores

    _, lines = join_stores(stores, output, overwrite=overwrite)
    say("\n".join(lines))


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Gets the source files and the stores train and valid.")
    ],
    train: Annotated[int, typer.Option(help="Scenes to train on.")] = 2000,
    valid: Annotated[int, typer.Option(help="Scenes held out: combinations that training never shows.")] = 400,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    boxes: Annotated[
        bool, typer.Option("--boxes", help="Also DIR/phrases/train and valid: phrases for objects with their boxes.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a demonstration set that is there.")] = False,
) -> None:
    """Draw a captioned demonstration set: shapes, colours, positions, in Chinese and English.

    Example: cnclip-ft data demo demo/data
    """
    from data_tools.scenes.writing import SIZE, draw_demo
    from data_tools.store import open_store

    side = SIZE if size is None else size
    draw_demo(folder, train=train, valid=valid, seed=seed, size=side, boxes=boxes, overwrite=overwrite)
    for split in ("train", "valid", *(("phrases/train", "phrases/valid") if boxes else ())):
        store = open_store(folder / split)
        say(f"{store.path}: {store.image_count:,} scenes, {len(store):,} pairs")


@app.command()
def show(
    store: Store,
    output: Annotated[Path, typer.Option(help="The PNG.")] = Path("contact-sheet.png"),
    columns: Annotated[int, typer.Option(help="Pictures across.")] = 6,
    rows: Annotated[int, typer.Option(help="Pictures down.")] = 4,
    seed: Annotated[int, typer.Option(help="Which random pairs.")] = 0,
    first: Annotated[bool, typer.Option("--first", help="The first pairs instead of random ones.")] = False,
    where: Where = None,
    boxes: Annotated[
        bool, typer.Option("--boxes", help="Pairs that have boxes alone, with their boxes drawn.")
    ] = False,
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
    from data_tools.shards import open_pairs

    opened = open_pairs(store)
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
        boxes=boxes,
    )
    beside = ", ".join(
        f"{name} {number:,}" for name, number in opened.beside_counts.items() if name != "pairs" and number
    )
    say(f"{output}: {count} pairs" + (f"; of {len(opened):,} in the store so many have: {beside}" if beside else ""))


def _show_rows(texts: ParallelTexts, count: int, seed: int | None) -> None:
    """Rows of parallel text as a table: the first ones, or random ones in their order."""
    import random

    from data_tools.tables import table, terminal_width

    count = min(count, len(texts))
    chosen = range(count) if seed is None else sorted(random.Random(seed).sample(range(len(texts)), count))
    languages = list(texts.languages)
    cells = [[str(number), *(texts.rows[number].get(language, "–") for language in languages)] for number in chosen]
    say(table(["row", *languages], cells, text=range(len(languages) + 1), width=terminal_width()))
