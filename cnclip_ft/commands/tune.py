"""`cnclip-ft tune`: search over a recipe's settings within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.options import PageLanguage, TrustImport
from cnclip_ft.commands.train import Overrides, RecipeName
from data_tools.tables import say


def tune(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where the search is kept.")] = Path(
        "runs/tune"
    ),
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Time for all trials, e.g. 2h, 90m.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="At most so many trials for each stage.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Search this stage only; may be repeated. [default: all]")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="Search over this key instead: stages.NAME.key=LOW..HIGH or =A,B,C; may be repeated.",
        ),
    ] = None,
    proceed: Annotated[bool, typer.Option("--continue", help="Go on with the search in the folder.")] = False,
    trust_import: TrustImport = False,
    language: PageLanguage = None,
) -> None:
    """Search over rates, batch, length, averaging, augmentation and more; writes the best recipe, and what mattered.

    The recipe itself is the first trial. Frozen features are computed once for all; trials that fall behind are given up.

    Example: cnclip-ft tune demo data.train=demo/data/train data.valid=demo/data/valid --budget 1h --output runs/search
    """
    from cnclip_ft.calls import read_recipe
    from cnclip_ft.evaluation.options import Options
    from cnclip_ft.tuning import outcome
    from cnclip_ft.tuning.search import Search, seconds_of
    from data_tools.tables import fitted, terminal_width
    from data_tools.words import language_of

    width, spoken = terminal_width(), language_of(language)
    searching = Search(
        read_recipe(recipe, overrides or (), trust_import),
        output,
        budget=None if budget is None else seconds_of(budget),
        trials=trials,
        stages=stage or (),
        given=search or (),
        trust_import=trust_import,
        say=lambda line: say(fitted(line, width)),
    )
    try:
        found = searching.execute(proceed=proceed)
    except KeyboardInterrupt:
        say(fitted(f"Stopped; the trials in {output} are kept. Give the same command with --continue to go on.", width))
        raise typer.Exit(130) from None
    last = found.spaces[-1].name
    judged = outcome.flattery(found, last, Options(trust_import=trust_import))
    file, page = outcome.write(found, judged, spoken)
    for space in found.spaces:
        if space.axes:
            mattered = outcome.importance(space, found.trials[space.name])
            say(
                f"\n{outcome.trials_table(space, found, width)}\n\n{outcome.settings_table(space, found, mattered, width)}"
            )
    lines: list[str] = [each for space in found.spaces for each in outcome.shortcomings(found, space)]
    lines += [] if judged is None else [judged.sentence()]
    lines += [f"warning: {found.warning}"] if found.warning else []
    lines += [f"Recipe: {file}", f"Page: {page}", f"Best checkpoint: {found.weights(found.winner(last))}"]
    say("\n" + fitted("\n".join(lines), width))
