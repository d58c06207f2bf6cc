"""`cnclip-ft encode`: features of a store, an image folder or a text file into files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Encoding, OnError, Origin, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say


@dataclass(frozen=True)
class Writing:
    """How the folder is written."""

    file_format: Annotated[
        str, typer.Option("--format", help="npy, or jsonl for the official feature files beside it.")
    ] = "npy"
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False
    on_error: OnError = "report"


@spread
def encode(
    *,
    checkpoint: Checkpoint,
    what: Annotated[
        str,
        typer.Argument(
            metavar="SPLIT|FOLDER|TEXTFILE", help="A store, a folder of images, or a .txt / .jsonl of texts."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the features.")],
    writing: Writing,
    encoding: Encoding,
    origin: Origin,
) -> None:
    """Unit features of images and texts, with their ids. The same command given again continues where it stopped.

    Uses all devices under torchrun or accelerate launch.

    Example: cnclip-ft encode runs/mine/contrast/best data/valid --output features/valid
    """
    from cnclip_ft.evaluation.encoding import encode_to_folder

    options = Options(**vars(encoding), **vars(origin))
    encode_to_folder(checkpoint, what, output, options, **vars(writing), say=say)
