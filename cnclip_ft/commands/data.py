"""`cnclip-ft data …`: files → store, what is wrong with a store, and a demonstration set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Build, import, check and draw image-text data.", no_args_is_help=True, rich_markup_mode=None)

OnError = Annotated[str, typer.Option("--on-error", help="fail: stop at the first fault; skip: note it in FAULTS.jsonl and go on.")]
MaxFaults = Annotated[int | None, typer.Option("--max-faults", min=0, help="With --on-error skip: stop above this many.")]
MaxSide = Annotated[int | None, typer.Option("--max-side", min=16, help="Re-encode pictures to JPEG of at most this side (fast training).")]
Quality = Annotated[int, typer.Option("--quality", min=1, max=100, help="JPEG quality with --max-side.")]
LayoutName = Annotated[str, typer.Option("--layout", help="plain, or official: what the official training code reads.")]


def _options(on_error: str, max_faults: int | None, max_side: int | None, quality: int, layout: str) -> dict:
    from data_tools.errors import RequestError

    for name, value, allowed in (("--on-error", on_error, ("fail", "skip")), ("--layout", layout, ("plain", "official"))):
        if value not in allowed:
            raise RequestError(f"{name} is {value!r}; use {' or '.join(allowed)}")
    return {"on_error": on_error, "max_faults": max_faults, "max_side": max_side, "quality": quality, "layout": layout}


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds {split}_imgs.tsv and {split}_texts.jsonl.")],
    splits: Annotated[str, typer.Option("--splits", help="Comma-separated names, e.g. train,valid.")] = "train,valid",
    output: Annotated[Path | None, typer.Option("--output", "--lmdb_dir", help="Where the stores go; DIR itself if not given.")] = None,
    on_error: OnError = "fail",
    max_faults: MaxFaults = None,
    max_side: MaxSide = None,
    quality: Quality = 90,
    layout: LayoutName = "plain",
) -> None:
    """Build stores from the official TSV + JSONL files.

    Example: cnclip-ft data build flickr30k-cn --splits train,valid,test
    """
    from data_tools.build import build_split
    from data_tools.errors import RequestError

    options = _options(on_error, max_faults, max_side, quality, layout)
    names = [name.strip() for name in splits.split(",") if name.strip()]
    if not names:
        raise RequestError("--splits names no split; write e.g. --splits train,valid")
    for split in names:
        typer.echo("\n".join(build_split(folder, split, output=output, **options).lines()))


imports = typer.Typer(help="Make a store from whatever there is.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(imports, name="import")


@imports.command("folder")
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Images, also in folders below.")],
    output: Annotated[Path, typer.Option("--output", help="The store to make, e.g. data/train.")],
    captions: Annotated[Path | None, typer.Option("--captions", help="Table (.csv, .tsv, .jsonl) with file and caption columns.")] = None,
    on_error: OnError = "fail",
    max_faults: MaxFaults = None,
    max_side: MaxSide = None,
    quality: Quality = 90,
    layout: LayoutName = "plain",
) -> None:
    """A folder of images with captions.csv/.tsv/.jsonl (or metadata.…), or one .txt beside each image.

    Example: cnclip-ft data import folder photos --output data/train --on-error skip
    """
    from data_tools.sources.folder import import_folder as execute

    options = _options(on_error, max_faults, max_side, quality, layout)
    typer.echo("\n".join(execute(folder, output, captions=captions, **options).lines()))


@app.command()
def check(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A split, e.g. data/train.")],
    against: Annotated[list[Path] | None, typer.Option("--against", help="Another split; shared images or texts are said.")] = None,
    context_length: Annotated[int, typer.Option("--context-length", help="Tokens a caption is cut to.")] = 52,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there too.")] = None,
) -> None:
    """What a split looks like and what in it would hurt training; exit 1 when something would.

    Example: cnclip-ft data check data/train --against data/valid
    """
    from cnclip_ft.data.texts import TextTokenizer
    from data_tools.check import check_store
    from data_tools.store import open_store

    others = [open_store(path) for path in against or []]
    report = check_store(open_store(store), others=others, token_lengths=TextTokenizer().lengths, context_length=context_length)
    width = max(len(name) for name in report.facts)
    for name, value in report.facts.items():
        typer.echo(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    for harm in report.harms:
        typer.echo(f"WRONG: {harm}")
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise typer.Exit(1 if report.harms else 0)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Source files and stores go there.")],
    train: Annotated[int, typer.Option(help="Scenes to train on.")] = 2000,
    valid: Annotated[int, typer.Option(help="Scenes to judge by; their combinations are not in training.")] = 400,
    seed: Annotated[int, typer.Option(help="The same seed draws the same scenes.")] = 0,
) -> None:
    """Draw the demonstration set: scenes with Chinese and English captions, nothing to download.

    Example: cnclip-ft data demo demo/data
    """
    from data_tools.scenes.writing import draw_demo

    draw_demo(folder, train=train, valid=valid, seed=seed)
    typer.echo(f"{folder}: {train:,} scenes to train on, {valid:,} to judge by, 3 Chinese and 2 English captions each")
