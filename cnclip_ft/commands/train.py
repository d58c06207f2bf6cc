"""`cnclip-ft plan` and `cnclip-ft train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnclip_ft.commands.options import TrustImport
from data_tools.errors import RequestError
from data_tools.tables import say

if TYPE_CHECKING:
    from cnclip_ft.recipe import Recipe


def _recipes(begun: str) -> list[str]:
    from cnclip_ft.recipe_files import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(begun)]


def _overrides(context: typer.Context, begun: str) -> list[str]:
    from cnclip_ft.recipe_files import complete_override

    return complete_override(context.params.get("recipe"), begun)


RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.", autocompletion=_recipes),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings to override, e.g. data.train=my/train.", autocompletion=_overrides
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Treat the plan's warnings as errors.")]


def plan(
    recipe: RecipeName, overrides: Overrides = None, strict: Strict = False, trust_import: TrustImport = False
) -> None:
    """Say what a run would do, and do nothing.

    Example: cnclip-ft plan demo data.train=demo/train data.valid=demo/valid
    """
    from cnclip_ft.training import plan as planning
    from cnclip_ft.training.context import make_context
    from cnclip_ft.training.stage_plan import plan_stages

    context, model = make_context(_recipe(recipe, overrides, trust_import), write=False, trust_import=trust_import)
    stages = plan_stages(context, model)
    say(planning.describe(context, model, stages))
    if strict:
        planning.refuse_warnings(context, model, stages)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    proceed: Annotated[
        bool, typer.Option("--continue", help="Go on with the run in the output folder, at the very step.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")] = False,
    strict: Strict = False,
    trust_import: TrustImport = False,
) -> None:
    """Train all stages of a recipe: on one device as it is, on many under torchrun or accelerate launch.

    Exit 130: stopped on request (Ctrl-C, SIGTERM, a closed terminal); go on with --continue.

    Example: cnclip-ft train flickr30k-cn_vit-b-16 data.train=flickr30k/train data.valid=flickr30k/valid output=runs/f30k
    """
    from cnclip_ft.training.run import train as execute
    from cnclip_ft.training.run_folder import run_of

    settings = _recipe(recipe, overrides, trust_import)
    moved = run_of(Path(recipe)) if proceed and not any(o.startswith("output=") for o in overrides or []) else None
    if moved is not None:  # the folder that the recipe lies in, wherever it was when the run began
        settings = settings.model_copy(update={"output": str(moved)})
    if not execute(settings, proceed=proceed, overwrite=overwrite, strict=strict, trust_import=trust_import):
        raise typer.Exit(130)


def _recipe(name: str, overrides: list[str] | None, trust_import: bool) -> Recipe:
    """The recipe. One that lies in a checkpoint's or a run's folder came with it: it may name code only where that is allowed."""
    from cnclip_ft.recipe_files import find_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    folder = find_recipe(name).parent
    came_along = any((folder / mark).exists() for mark in ("cnclip_ft.json", "config.json", "journal.jsonl"))
    if came_along and not trust_import and recipe.model.code is not None:
        raise RequestError(
            f"{find_recipe(name)}: a recipe that lies in the folder of a checkpoint or a run, and names code as image tower, "
            f"{recipe.model.code}. Nothing was imported. If the folder is your own, or you know that code: --trust-import"
        )
    return recipe
