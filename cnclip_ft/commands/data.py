"""`cnclip-ft data`: files → stores, what is in them, how they look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnclip_ft.commands.options import spread

if TYPE_CHECKING:
    from data_tools.store import PairStore

app = typer.Typer(help="Build, import, check and look at image-text data.", no_args_is_help=True, rich_markup_mode=None)

Workers = Annotated[int, typer.Option(help="Threads that read, check and re-encode pictures.")]
Stores = Annotated[list[Path], typer.Argument(metavar="STORE…", help="<dir>/<split>, or a folder of splits.")]


@dataclass(frozen=True)
class Building:
    """How a store is built: what `build` and `import` share."""

    layout: Annotated[str, typer.Option(help="plain (ours) or official (what cn_clip reads).")] = "plain"
    shard_size: Annotated[int | None, typer.Option(help="Images a shard; without it the store is in one piece.")] = None
    max_side: Annotated[int | None, typer.Option(help="Shrink pictures to this longer side, in pixels.")] = None
    quality: Annotated[
        int | None, typer.Option(help="Re-encode pictures with this quality, 1 to 100 (85 with --max-side).")
    ] = None
    image_format: Annotated[str, typer.Option(help="jpeg or webp, for re-encoded pictures.")] = "jpeg"
    pixel_limit: Annotated[int | None, typer.Option(help="Refuse pictures of more pixels (179 million).")] = None
    language: Annotated[str, typer.Option(help="Of texts that do not say: zh, en, mixed, or detect.")] = "detect"
    on_error: Annotated[
        str, typer.Option(help="fail: stop at the first fault; skip: list it in faults.jsonl and go on.")
    ] = "fail"
    max_faults: Annotated[int, typer.Option(help="With skip: stop above this many.")] = 1000
    resume: Annotated[bool, typer.Option("--continue", help="Go on with an interrupted build of the same data.")] = (
        False
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the stores that are there (stores only).")] = (
        False
    )
    workers: Workers = 0

    def arguments(self) -> dict[str, Any]:
        """For `build_store`; refused where they make no sense.

        Raises:
            RequestError: naming the flag.
        """
        from data_tools.errors import RequestError
        from data_tools.language import LANGUAGES
        from data_tools.pictures import PIXEL_LIMIT, Reencoding

        for name, known in (
            ("layout", ("plain", "official")),
            ("on_error", ("fail", "skip")),
            ("language", (*LANGUAGES, "detect")),
        ):
            if getattr(self, name) not in known:
                raise RequestError(f"{_flag(name)} {getattr(self, name)!r}: one of {', '.join(known)}")
        for name, least in (("shard_size", 1), ("workers", 0), ("max_faults", 0), ("pixel_limit", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise RequestError(f"{_flag(name)} {number}: at least {least}")
        reencoding = None
        if self.max_side is not None or self.quality is not None:
            reencoding = Reencoding(self.max_side, self.quality, self.image_format)
        elif self.image_format != "jpeg":
            raise RequestError("--image-format is for re-encoded pictures; add --max-side or --quality")
        spoken_for = {"max_side", "quality", "image_format"}
        given = {name: value for name, value in vars(self).items() if name not in spoken_for}
        return given | {"reencoding": reencoding, "pixel_limit": self.pixel_limit or PIXEL_LIMIT}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _comma_list(value: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def _refuse_targets(targets: Iterable[Path], read: list[Path], building: Building, *, inside: bool) -> None:
    """Every place is free or may be replaced, before the first store is built."""
    from data_tools.outputs import refuse_overlap
    from data_tools.store import refuse_place

    for target in targets:
        refuse_overlap(target, read, inside=inside)
        if not building.resume:  # what an interrupted build was allowed, going on with it is: that is looked at there
            refuse_place(target, overwrite=building.overwrite)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say on Ctrl-C how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            "stopped; the old store, if there was one, is untouched. The same command with --continue goes on.",
            err=True,
        )
        raise typer.Exit(130) from None


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
    if folder is None or not _comma_list(splits):
        raise RequestError("name the folder and the splits: cnclip-ft data build DIR --splits train,valid")
    options = building.arguments()
    targets = {split: (output or folder) / split for split in _comma_list(splits)}
    for split in targets:
        OfficialSource(folder, split).open()  # all of them are there, before the first is built
    files = [
        file for split in targets for file in vars(OfficialSource(folder, split)).values() if isinstance(file, Path)
    ]
    _refuse_targets(targets.values(), files, building, inside=False)
    for split, target in targets.items():
        with _interruptible():
            report = build_split(folder, split, target, **options)
        typer.echo("\n".join(report.lines()))


@app.command("import")
@spread
def import_(
    *,
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="folder, table, imagefolder, webdataset, official, flickr8k-cn, flickr30k-cn, coco-cn or muge (docs/data.md).",
        ),
    ],
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The folder, the table file, or the tars.")],
    output: Annotated[Path, typer.Option(help="The store; for a source with splits the folder above: OUTPUT/<split>.")],
    splits: Annotated[str, typer.Option(help="Only these splits, separated by commas.")] = "",
    captions: Annotated[
        Path | None, typer.Option(help="folder: the captions file, where it is not found by its name.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where the pictures lie, where it is not SOURCE.")] = None,
    captions_from: Annotated[
        str, typer.Option(help="flickr8k-cn: zhc, zhb, zhg, zhmtest, enc; coco-cn: written, translated.")
    ] = "",
    image_column: Annotated[str | None, typer.Option(help="Column of image paths or bytes.")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column of captions; may be given several times.")
    ] = None,
    image_id_column: Annotated[str | None, typer.Option(help="Column of image ids; default: the path.")] = None,
    text_id_column: Annotated[str | None, typer.Option(help="Column of text ids; default: numbered.")] = None,
    language_column: Annotated[str | None, typer.Option(help="Column of languages.")] = None,
    encoding: Annotated[str, typer.Option(help="Of text files (tables, captions), for example gb18030.")] = "utf-8",
    header: Annotated[
        bool,
        typer.Option(
            "--header/--no-header",
            help="Whether the first row of a CSV or TSV names the columns; else they are 1, 2, ….",
        ),
    ] = True,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take pictures that names or links find outside of the folder.")
    ] = False,
    building: Building,
) -> None:
    """Build a store from what you have.

    Example: cnclip-ft data import folder PHOTOS --output DIR/train

    Example: cnclip-ft data import table pairs.csv --images PHOTOS --image-column file --text-column caption --output DIR/train

    Example: cnclip-ft data import coco-cn coco-cn-version1805v1.1 --images MSCOCO --output coco-cn
    """
    from data_tools.build import build_store
    from data_tools.errors import RequestError
    from data_tools.sources import SourceOptions, open_source
    from data_tools.sources.column_names import Columns

    options = building.arguments()
    columns = Columns(image_column, tuple(text_column or ()), image_id_column, text_id_column, language_column)
    found = open_source(
        kind,
        source,
        SourceOptions(captions, images, tuple(_comma_list(captions_from)), columns, encoding, header, allow_outside),
    )
    wanted = _comma_list(splits) or list(found)
    for split in wanted:
        if split not in found:
            named = ", ".join(name for name in found if name)
            raise RequestError(f"--splits {split}: {source} has {named or 'no splits'}")
    if not splits and kind in ("flickr30k-cn", "muge"):  # a distribution may have been fetched in part
        files = {split: getattr(found[split], "images", None) for split in wanted}
        wanted = [split for split, file in files.items() if file is None or file.is_file()] or wanted
    for split in wanted:
        found[split].open()
    targets = {split: output / split if split else output for split in wanted}
    read = [Path(place) for place in (source, images, captions) if place is not None]
    # Where the official files lie, their stores may lie as well; a table's pictures may be anywhere below it.
    beside = kind in ("official", "muge", "flickr30k-cn") or (
        images is not None and Path(source).is_relative_to(images)
    )
    _refuse_targets(targets.values(), read, building, inside=not beside)
    for split, target in targets.items():
        with _interruptible():
            report = build_store(found[split], target, **options)
        typer.echo("\n".join(report.lines()))


def _open_splits(places: list[Path]) -> dict[str, PairStore]:
    """Stores by a name each; a folder of splits gives all of them."""
    from data_tools.errors import RequestError
    from data_tools.store import open_store

    stores: dict[str, PairStore] = {}
    for place in places:
        inside = []
        if place.is_dir() and not (place / "pairs").exists() and not any(place.glob("shard-*")):
            inside = sorted(p for p in place.iterdir() if (p / "pairs").is_dir() or any(p.glob("shard-*")))
        for path in inside or [place]:
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
    decode: Annotated[bool, typer.Option(help="Decode every picture, or read the headers only.")] = True,
    workers: Workers = 2,
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

    opened = _open_splits(stores)
    ours = "a report of `data check`"
    refuse_files(
        [(json_file, json_with("splits", "leakage", "findings"), ours), (html_file, begins(BEGINS), ours)],
        [store.path for store in opened.values()],
    )
    lengths = read_tokenizer({"context_length": context_length}, vocabulary).lengths
    report = judge(
        [
            measure(store, lengths=lengths, context_length=context_length, decode=decode, workers=workers)
            for store in opened.values()
        ]
    )
    typer.echo(in_words(report, terminal_width()))
    if json_file is not None:
        with whole_file(json_file, "w") as file:
            json.dump(report.as_dict(), file, ensure_ascii=False, indent=1)
    if html_file is not None:
        write_page(report, opened, html_file)
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
        typer.echo(f"{store.path}: {store.image_count:,} scenes, {len(store):,} pairs")


@app.command()
def show(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="<dir>/<split>.")],
    output: Annotated[Path, typer.Option(help="The PNG.")] = Path("contact-sheet.png"),
    columns: Annotated[int, typer.Option(help="Pictures across.")] = 6,
    rows: Annotated[int, typer.Option(help="Pictures down.")] = 4,
    seed: Annotated[int, typer.Option(help="Which random pairs.")] = 0,
    first: Annotated[bool, typer.Option("--first", help="The first pairs instead of random ones.")] = False,
    font: Annotated[Path | None, typer.Option(help="A .ttf, .ttc or .otf with the glyphs of the captions.")] = None,
) -> None:
    """Draw a contact sheet: pictures with their captions.

    Example: cnclip-ft data show DIR/train --output sheet.png
    """
    from data_tools.contact_sheet import draw_sheet, is_sheet
    from data_tools.outputs import refuse_files
    from data_tools.store import open_store

    refuse_files([(output, is_sheet, "a contact sheet of `data show`")], [store])
    count = draw_sheet(open_store(store), output, columns=columns, rows=rows, seed=None if first else seed, font=font)
    typer.echo(f"{output}: {count} pairs")
