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
        typer.Argument(
            metavar="[SPLIT]...",
            help="Stores to score on, or a data set's folder (its valid and test); for a prediction file, the answers.",
        ),
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
    official: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the official scripts' prediction and score files of each split."),
    ] = None,
    encoding: Encoding,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Recall@1/5/10 text→image and image→text, mean recall and median rank over the whole pool, per language.

    Ties count against the model. A direction without ground truth is left out, and that is said.

    Example: cnclip-ft evaluate runs/mine/contrast/best data/valid data/test --json scores.json

    Example: cnclip-ft evaluate runs/muge/contrast/best datasets/MUGE --official results
    """
    from cnclip_ft import calls
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.scorecard import score_predictions
    from cnclip_ft.features import official_files
    from data_tools.errors import RequestError
    from data_tools.tables import terminal_width

    path = Path(checkpoint)
    refuse_outputs([checkpoint, *(splits or [])], json_file=json_file, kind="splits", markdown=markdown)
    if path.is_file() and path.suffix == ".jsonl":
        if official:
            raise RequestError(f"{checkpoint} is a prediction file already; --official is for a checkpoint")
        line, score = score_predictions(path, splits or [])
        say(line)
        if json_file:
            official_files.write_json(json_file, score)
        return
    card = calls.evaluate(
        checkpoint,
        *splits or (),
        **vars(encoding),
        **vars(origin),
        memory=memory,
        dataset=dataset,
        by=by,
        official=official,
    )
    say(card.table(width=terminal_width()))
    if official:
        say(f"official result files of {', '.join(card.scores)} in {official}")
    if json_file:
        official_files.write_json(json_file, card.as_dict())
    if markdown:
        official_files.write_text(markdown, card.table(markdown=True).split("\n"))
