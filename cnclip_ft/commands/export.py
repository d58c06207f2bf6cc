"""`cnclip-ft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")],
    to: Annotated[str, typer.Option("--to", help="huggingface")] = "huggingface",
    output: Annotated[Path, typer.Option("--output", help="Folder to write.")] = Path("export"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in another format and check its features against the source.

    Example: cnclip-ft export runs/mine/contrast/best --to huggingface --output mine-hf
    """
    from data_tools.errors import RequestError

    if to != "huggingface":
        raise RequestError(f"--to is {to!r}; use huggingface")
    if output.exists() and not overwrite and any(output.iterdir() if output.is_dir() else [output]):
        raise RequestError(f"{output} is there already; choose another --output, or --overwrite")

    from cnclip_ft.export.huggingface import export_huggingface
    from cnclip_ft.export.parity import require_parity
    from cnclip_ft.models.checkpoints import load

    difference = export_huggingface(load(checkpoint), output, checkpoint)
    require_parity(difference, output)
    typer.echo(f"{output}: written; largest difference of unit features to the source {difference:.1e}")
