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
    grounding: Annotated[
        bool,
        typer.Option(
            "--grounding", help="Where phrases are, instead of recall: stores whose pairs have boxes, four protocols."
        ),
    ] = False,
    method: Annotated[str | None, typer.Option(help="With --grounding: as of `ground`.")] = None,
    threshold: Annotated[float | None, typer.Option(help="With --grounding: as of `ground`.")] = None,
    swapped: Annotated[
        bool,
        typer.Option(
            "--swapped", help="Are captions told from themselves with a colour, number, place or thing swapped?"
        ),
    ] = False,
    encoding: Encoding,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Recall@1/5/10 text→image and image→text, mean recall and median rank over the whole pool, per language.

    Ties count against the model. A direction without ground truth is left out, and that is said.

    Example: cnclip-ft evaluate runs/mine/contrast/best data/valid data/test --json scores.json

    Example: cnclip-ft evaluate runs/muge/contrast/best datasets/MUGE --official results

    Example: cnclip-ft evaluate runs/mine/contrast/best boxes/valid --grounding
    """
    from cnclip_ft import calls
    from cnclip_ft.evaluation.grounding.judging import GroundingCard, score_grounding
    from cnclip_ft.evaluation.outputs import refuse_outputs
    from cnclip_ft.evaluation.scores.scorecard import Scorecard, score_predictions
    from cnclip_ft.features import official_files
    from cnclip_ft.features.folder import is_feature_folder
    from data_tools.errors import RequestError
    from data_tools.tables import terminal_width

    path = Path(checkpoint)
    if not grounding and (method is not None or threshold is not None):
        raise RequestError("--method and --threshold say how phrases are looked for: give --grounding too")
    if grounding:
        for name, given in (
            ("--official", official),
            ("--by", by),
            ("--dataset", dataset),
            ("--swapped", swapped or None),
        ):
            if given is not None:
                raise RequestError(
                    f"{name} is for recall; --grounding says where phrases are: leave one of the two out"
                )
        if path.is_file() and path.suffix == ".jsonl" or is_feature_folder(path):
            raise RequestError(
                f"{checkpoint} holds no model; --grounding needs a checkpoint, which looks at the pictures"
            )
    refuse_outputs([checkpoint, *(splits or [])], json_file=json_file, kind="splits", markdown=markdown)
    if path.is_file() and path.suffix == ".jsonl":
        if official or swapped:
            flag = "--official" if official else "--swapped"
            raise RequestError(f"{checkpoint} is a prediction file already; {flag} is for a checkpoint")
        line, score = score_predictions(path, splits or [])
        say(line)
        if json_file:
            official_files.write_json(json_file, score)
        return
    card: Scorecard | GroundingCard
    if grounding:
        options = Options(**vars(encoding), **vars(origin), memory=memory)
        card = score_grounding(checkpoint, splits or [], options, method, threshold)
    else:
        card = calls.evaluate(
            checkpoint,
            *splits or (),
            **vars(encoding),
            **vars(origin),
            memory=memory,
            dataset=dataset,
            by=by,
            official=official,
            swapped=swapped,
        )
    say(card.table(width=terminal_width()))
    if official:
        say(f"official result files of {', '.join(card.scores)} in {official}")
    if json_file:
        official_files.write_json(json_file, card.as_dict())
    if markdown:
        official_files.write_text(markdown, card.table(markdown=True).split("\n"))
