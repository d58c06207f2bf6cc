"""`cnclip-ft average`: the mean weights of several fine-tunings of one start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import Encoding, Memory, Origin, spread
from cnclip_ft.evaluation.options import Options
from data_tools.tables import say


@spread
def average(
    *,
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="A B...", help="Two or more checkpoints that began with the same weights.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Checkpoint to write.")] = Path("average"),
    judge: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="STORE",
            help="Score each, the mean of all and the greedy mean by mean recall here, and write the best; may be repeated.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier checkpoint.")] = False,
    encoding: Encoding,
    memory: Memory = Options.memory,
    origin: Origin,
) -> None:
    """Several runs from one start as one model: the mean of their weights, uniform or greedy (model soups).

    Example: cnclip-ft average runs/a/contrast/best runs/b/contrast/best runs/c/contrast/best --judge data/valid
    """
    from cnclip_ft.evaluation.results.provenance import image_size_notes
    from cnclip_ft.evaluation.soup import average as average_of
    from data_tools.tables import fitted, table, terminal_width

    options = Options(**vars(encoding), **vars(origin), memory=memory)
    made = average_of(checkpoints, output, judge or (), options, overwrite=overwrite, progress=True)
    width, winner = terminal_width(), made.winner
    if made.alike:
        say(
            fitted(
                "warning: the checkpoints hold the same weights, so there is nothing to average. Where a stage ended at its start, its best "
                "is that start: average its last instead (RUN/STAGE/last), or train further",
                width,
            )
        )
    notes = image_size_notes(made.at_size)
    if winner is None:
        say(
            fitted(
                f"{output}: the mean of {len(made.members)} checkpoints, not judged (--judge STORE does that)"
                + "".join(f"; {note}" for note in notes),
                width,
            )
        )
        return
    numbers = {name: str(number) for number, name in enumerate(checkpoints, 1)}
    rows = [
        [
            each.name,
            " ".join(numbers[member] for member in each.members),
            f"{each.score:.2f}",
            "written" * (each is winner),
        ]
        for each in made.judged
    ]
    say(table(["weights", "of", "mean recall", ""], rows, text=(0, 1, 3), width=width))
    for note in notes:
        say(fitted(f"note: {note}", width))
    single = max(each.score for each in made.judged if len(each.members) == 1)
    if len(made.members) == 1:
        said = f"{output}: no mean beats {made.members[0]}, whose weights it holds"
    else:
        said = f"{output}: the mean of {len(made.members)} checkpoints, {winner.score - single:+.2f} points to the best of them"
    say(
        fitted(
            f"\n{said}. It was chosen on this data, which flatters it: tell its recall on a split kept apart.", width
        )
    )
