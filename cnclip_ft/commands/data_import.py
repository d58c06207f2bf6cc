"""`cnclip-ft data import`: pictures and texts as people have them → stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.building import Building, comma_list, interruptible, refuse_targets
from cnclip_ft.commands.data_check import check
from cnclip_ft.commands.options import spread
from data_tools.tables import say

if TYPE_CHECKING:
    from data_tools.items import Source
    from data_tools.splitting import Shares


@spread
def import_(
    *,
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="folder, table, imagefolder, webdataset, official, flickr8k-cn, flickr30k-cn, coco-cn, muge, boxes or parallel (docs/data.md#sources-of-data-import).",
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE…",
            help="The folder, the tables or tars; several of them, or patterns like 'train-*.parquet'.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The store; for a source with splits the folder above: OUTPUT/<split>.")],
    splits: Annotated[str, typer.Option(help="Only these splits, separated by commas.")] = "",
    split: Annotated[
        str,
        typer.Option(metavar="SHARES", help="Deal pictures, like ones together: 0.8,0.1,0.1 is train, valid, test."),
    ] = "",
    split_column: Annotated[str, typer.Option(metavar="NAME", help="Column that says each picture's split.")] = "",
    seed: Annotated[int, typer.Option(help="Of --split: the same seed deals the same pictures alike.")] = 0,
    part: Annotated[
        str,
        typer.Option(
            metavar="K/N", help="Build the K-th of N parts alone, a job of an array; `data join` is for all of them."
        ),
    ] = "",
    append: Annotated[bool, typer.Option("--append", help="Add to the stores that are there.")] = False,
    update_columns: Annotated[
        bool,
        typer.Option("--update-columns", help="With --append: columns of pictures that are there take the new values."),
    ] = False,
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
    negatives_column: Annotated[
        str | None, typer.Option(help="Column of texts that are wrong for the picture. [default: negatives]")
    ] = None,
    weight_column: Annotated[
        str | None, typer.Option(help="Column of weights of the captions. [default: weight]")
    ] = None,
    keep_columns: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Other columns kept with the picture; 'none'. [default: all]")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files, for example gb18030; auto finds it.")] = "auto",
    header: Annotated[
        bool,
        typer.Option(
            "--header/--no-header",
            help="Whether the first row of a CSV, TSV or Excel file names the columns; else they are 1, 2, ….",
        ),
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Then say what is in it and what would hurt, as `data check` does.")
    ] = False,
    names: Annotated[
        Path | None, typer.Option(help="boxes: a TSV name<TAB>translation; each phrase in it stands in both languages.")
    ] = None,
    box_format: Annotated[
        str, typer.Option(help="boxes: xywh (corner and sides) or xyxy (two corners), for rows. [default: xywh]")
    ] = "",
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take pictures that names or links find outside of the folder.")
    ] = False,
    building: Building,
) -> None:
    """Build a store from what you have.

    Example: cnclip-ft data import folder PHOTOS --output DIR/train

    Example: cnclip-ft data import table goods.xlsx --images PHOTOS --split 0.8,0.1,0.1 --check --output DIR

    Example: cnclip-ft data import boxes instances_val2017.json --images val2017 --names zh.tsv --output DIR/phrases

    Example: cnclip-ft data import webdataset 'shards/*.tar' --part 3/64 --output DIR/part-3

    Example: cnclip-ft data import parallel sentences.tsv --output DIR/parallel

    Example: cnclip-ft data import table next-month.csv --images PHOTOS --split 0.8,0.1,0.1 --append --output DIR
    """
    from data_tools.errors import RequestError
    from data_tools.sources import SourceOptions, open_source
    from data_tools.sources.column_names import Columns
    from data_tools.sources.share import Share, ShareOf

    if kind == "parallel" and (append or split or split_column or building.layout == "official"):
        raise RequestError(
            "parallel text goes into one store of our layout, from all files in one line: leave out --append, --split, --split-column "
            "and --layout official"
        )
    if part and (append or split or split_column or kind == "parallel" or building.layout == "official"):
        raise RequestError(
            "--part builds one part of a source into one store of our layout: leave out --append, --split, --split-column and "
            "--layout official; parallel text is one store"
        )
    share = Share.parse(part) if part else None
    if append and building.overwrite:
        raise RequestError("--append adds to the stores that are there, --overwrite replaces them: give one of the two")
    if update_columns and not append:
        raise RequestError(
            "--update-columns changes what stores say of pictures that are there: it goes with --append only"
        )
    keep = None if keep_columns is None else tuple(comma_list("" if keep_columns == "none" else keep_columns))
    texts, beside_texts = tuple(text_column or ()), (negatives_column, weight_column)
    columns = Columns(image_column, texts, image_id_column, text_id_column, language_column, keep, *beside_texts)
    found = open_source(
        kind,
        sources,
        SourceOptions(
            captions,
            images,
            tuple(comma_list(captions_from)),
            columns,
            encoding,
            header,
            allow_outside,
            names,
            box_format,
        ),
    )
    read = [Path(place) for place in (*sources, images, captions, names) if place is not None]
    # Where the official files lie, their stores may lie as well; a table's pictures may be anywhere below it.
    beside = kind in ("official", "muge", "flickr30k-cn") or (
        images is not None and Path(sources[0]).is_relative_to(images)
    )
    if split or split_column:
        how = _how(split, split_column, seed)
        if list(found) != [""]:
            raise RequestError(
                f"{kind} has splits of its own ({', '.join(found)}): leave out --split and --split-column"
            )
        made = _into_splits(found[""], output, how, append, update_columns, building, read, inside=not beside)
        _look([output / name for name in made], check)
        return
    wanted = comma_list(splits) or list(found)
    for name in wanted:
        if name not in found:
            named = ", ".join(name for name in found if name)
            raise RequestError(f"--splits {name}: {sources[0]} has {named or 'no splits (to deal pictures: --split)'}")
    if not splits and kind in ("flickr30k-cn", "muge"):  # a distribution may have been fetched in part
        files = {name: getattr(found[name], "images", None) for name in wanted}
        wanted = [name for name, file in files.items() if file is None or file.is_file()] or wanted
    for name in wanted:
        found[name].open()
    dealt = {name: found[name] if share is None else ShareOf(found[name], share) for name in wanted}
    built = {output / name if name else output: source for name, source in dealt.items()}
    _into_stores(built, append, update_columns, building, read, not beside)
    _look(list(built), check)


def _how(split: str, split_column: str, seed: int) -> Shares | str:
    from data_tools.errors import RequestError
    from data_tools.splitting import Shares

    if split and split_column:
        raise RequestError("--split deals pictures, --split-column reads where they belong: give one of the two")
    return Shares.parse(split, seed) if split else split_column


def _into_splits(
    source: Source,
    output: Path,
    how: Shares | str,
    append: bool,
    update_columns: bool,
    building: Building,
    read: list[Path],
    *,
    inside: bool,
) -> list[str]:
    from data_tools.outputs import refuse_overlap
    from data_tools.splitting import NAMES, Shares, build_splits
    from data_tools.store import stores_below

    options = building.arguments()
    source.open()
    if isinstance(how, Shares) and not append:
        refuse_targets([output / name for name in how.sizes], read, building, inside=inside)
    refuse_overlap(output, [place for place in read if place.is_file()], inside=False)
    with interruptible():
        lines = build_splits(source, output, how, append=append, update_columns=update_columns, **options)
    say("\n".join(lines))
    names = [path.name for path in stores_below(output)]
    return sorted(names, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))


def _look(stores: list[Path], wanted: bool) -> None:
    """What `data check` says of what was built, with its exit code."""
    if wanted:
        say("")
        check(stores)


def _into_stores(
    sources: dict[Path, Source], append: bool, update_columns: bool, building: Building, read: list[Path], inside: bool
) -> None:
    from data_tools.appending import append_to
    from data_tools.build import build_store

    options = building.arguments()
    appended = [target for target in sources if append and target.exists()]
    refuse_targets([target for target in sources if target not in appended], read, building, inside=inside)
    for target, source in sources.items():
        with interruptible():
            if target in appended:
                report = append_to(source, target, update_columns=update_columns, **options)
            else:
                report = build_store(source, target, **options)
        say("\n".join(report.lines()))
