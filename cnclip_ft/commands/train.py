"""`cnclip-ft plan` and `cnclip-ft train`."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, e.g. data.train=my/train.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Treat the plan's warnings as errors.")]


def plan(recipe: RecipeName, overrides: Overrides = None, strict: Strict = False) -> None:
    """Say what a run would do, and do nothing.

    Example: cnclip-ft plan demo data.train=demo/train data.valid=demo/valid
    """
    from cnclip_ft.recipe import load_recipe
    from cnclip_ft.training import plan as planning
    from cnclip_ft.training.run import Run

    run = Run(load_recipe(recipe, overrides), write=False)
    typer.echo(planning.describe(run))
    if strict:
        planning.refuse_warnings(run)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    proceed: Annotated[
        bool, typer.Option("--continue", help="Go on with the run in the output folder, at the very step.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")] = False,
    strict: Strict = False,
) -> None:
    """Train all stages of a recipe: on one device as it is, on many under torchrun or accelerate launch.

    Example: cnclip-ft train flickr30k-cn_vit-b-16 data.train=flickr30k/train data.valid=flickr30k/valid output=runs/f30k
    """
    from cnclip_ft.recipe import load_recipe
    from cnclip_ft.training.run import train as execute

    execute(load_recipe(recipe, overrides), proceed=proceed, overwrite=overwrite, strict=strict)
