"""`cnclip-ft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")],
    to: Annotated[str, typer.Option("--to", help="huggingface (a folder) or cn_clip (a .pt file).")] = "huggingface",
    output: Annotated[Path, typer.Option("--output", help="Folder or file to write.")] = Path("export"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in another format and check its features against the source.

    Example: cnclip-ft export runs/mine/contrast/best --to huggingface --output mine-hf
    """
    from data_tools.errors import RequestError

    if to not in ("huggingface", "cn_clip"):
        raise RequestError(f"--to is {to!r}; use huggingface or cn_clip")
    if output.exists() and not overwrite and any(output.iterdir() if output.is_dir() else [output]):
        raise RequestError(f"{output} is there already; choose another --output, or --overwrite")

    from cnclip_ft.export.parity import require_parity
    from cnclip_ft.models.checkpoints import load

    if to == "huggingface":
        from cnclip_ft.export.huggingface import export_huggingface as write
    else:
        from cnclip_ft.export.cn_clip import export_cn_clip as write
    difference = write(load(checkpoint), output, checkpoint)
    require_parity(difference, output)
    typer.echo(f"{output}: written; largest difference of unit features to the source {difference:.1e}")
