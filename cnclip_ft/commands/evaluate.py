"""`cnclip-ft evaluate`: recall of a checkpoint, a feature folder or a prediction file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Encoding, Json, Memory, Origin, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say


@spread
def evaluate(
    *,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint; or a folder written by `encode`; or an official prediction file (.jsonl).",
        ),
    ],
    splits: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPLIT]...", help="Stores to score on; for a prediction file, the official answers."),
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Published rows to show: muge, flickr30k-cn, coco-cn, none. [default: judged by the path]"),
    ] = Options.dataset,
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Recall for every value of a kept column too, e.g. a category.")
    ] = None,
    encoding: Encoding,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Recall@1/5/10 text→image and image→text, mean recall and median rank over the whole pool, per language.

    Ties count against the model. A direction without ground truth is left out, and that is said.

    Example: cnclip-ft evaluate runs/mine/contrast/best data/valid data/test --json scores.json
    """
    from cnclip_ft import calls
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.scorecard import score_predictions
    from cnclip_ft.features import official_files
    from data_tools.tables import terminal_width

    path = Path(checkpoint)
    refuse_outputs([checkpoint, *(splits or [])], json_file=json_file, kind="splits", markdown=markdown)
    if path.is_file() and path.suffix == ".jsonl":
        line, score = score_predictions(path, splits or [])
        say(line)
        if json_file:
            official_files.write_json(json_file, score)
        return
    card = calls.evaluate(
        checkpoint, *splits or (), **vars(encoding), **vars(origin), memory=memory, dataset=dataset, by=by
    )
    say(card.table(width=terminal_width()))
    if json_file:
        official_files.write_json(json_file, card.as_dict())
    if markdown:
        official_files.write_text(markdown, card.table(markdown=True).split("\n"))
