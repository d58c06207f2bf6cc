"""`cnclip-ft export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Checkpoint, Dimensions, ImageSize, Origin, spread
from data_tools.tables import say


@dataclass(frozen=True)
class Writing:
    """How it is written and looked at: what `export_checkpoint` takes beside the three arguments."""

    dtype: Annotated[
        str, typer.Option(help="Precision of the written weights: float32, float16, bfloat16 (not onnx), int8 (onnx).")
    ] = "float32"
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="SPLIT", help="int8: settle the ranges on this store, not anew for every input."),
    ] = None
    verify: Annotated[
        Path | None, typer.Option(metavar="SPLIT", help="Compare recall of source and export on this store.")
    ] = None
    license_name: Annotated[
        str | None,
        typer.Option("--license", metavar="NAME", help="For the model card, as the hub writes it, e.g. apache-2.0."),
    ] = None
    image_size: ImageSize = None
    dimensions: Dimensions = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False


@spread
def export(
    *,
    checkpoint: Checkpoint,
    to: Annotated[
        str, typer.Option("--to", help="huggingface, open_clip, onnx (folders) or cn_clip (a .pt file).")
    ] = "huggingface",
    output: Annotated[Path, typer.Option("--output", help="Folder or file to write.")] = Path("export"),
    writing: Writing,
    origin: Origin,
) -> None:
    """Write a checkpoint in another format and check its features against the source.

    Example: cnclip-ft export runs/mine/contrast/best --to onnx --dtype int8 --verify data/valid --output mine-onnx
    """
    from cnclip_ft.evaluation.results.provenance import image_size_notes
    from cnclip_ft.evaluation.results.recall_table import recall_table
    from cnclip_ft.export.run import export_checkpoint, points_lost
    from data_tools.tables import terminal_width

    done = export_checkpoint(checkpoint, to, output, **vars(writing), **vars(origin))
    say(f"{done.output}: written; largest difference of unit features to the source {done.difference:.1e}")
    for note in image_size_notes(done.at_size):
        say(f"note: {note}")
    if done.recall is not None:
        before, after = done.recall
        say(recall_table({"source": before, "export": after}, width=terminal_width()))
        say(f"points of mean recall lost: {points_lost(before, after)}")
    say(done.advice)
