"""`cnclip-ft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or file, or a published name.")
    ],
    to: Annotated[str, typer.Option("--to", help="huggingface (a folder) or cn_clip (a .pt file).")] = "huggingface",
    output: Annotated[Path, typer.Option("--output", help="Folder or file to write.")] = Path("export"),
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16: precision of the written weights.")
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    source: Annotated[
        str, typer.Option("--source", help="Where a published name comes from: huggingface or modelscope.")
    ] = "huggingface",
) -> None:
    """Write a checkpoint in another format and check its features against the source.

    Example: cnclip-ft export runs/mine/contrast/best --to huggingface --output mine-hf
    """
    from cnclip_ft.export.run import export_checkpoint

    done = export_checkpoint(checkpoint, to, output, dtype=dtype, overwrite=overwrite, source=source)
    typer.echo(f"{done.output}: written; largest difference of unit features to the source {done.difference:.1e}")
    typer.echo(done.advice)
