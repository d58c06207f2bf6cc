"""`cnclip-ft plan` and `cnclip-ft train`."""

from __future__ import annotations

from typing import Annotated

import typer

from cnclip_ft.commands.options import TrustImport
from data_tools.tables import say


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
    from cnclip_ft.calls import read_recipe
    from cnclip_ft.training import advice
    from cnclip_ft.training import plan as planning
    from cnclip_ft.training.context import make_context
    from cnclip_ft.training.stage_plan import plan_stages

    context, model = make_context(
        read_recipe(recipe, overrides or (), trust_import), write=False, trust_import=trust_import
    )
    stages = plan_stages(context, model)
    say(planning.describe(context, model, stages))
    if strict:
        advice.refuse_warnings(context, model, stages)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    proceed: Annotated[
        bool, typer.Option("--continue", help="Go on with the run in the output folder, at the very step.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")] = False,
    strict: Strict = False,
    trust_import: TrustImport = False,
    language: Annotated[str | None, typer.Option(help="Of the report: zh or en. [default: the system's]")] = None,
) -> None:
    """Train all stages of a recipe: on one device as it is, on many under torchrun or accelerate launch.

    Exit 130: stopped on request (Ctrl-C, SIGTERM, a closed terminal); go on with --continue.

    Example: cnclip-ft train flickr30k-cn_vit-b-16 data.train=flickr30k/train data.valid=flickr30k/valid output=runs/f30k
    """
    from cnclip_ft import calls

    done = calls.train(
        recipe,
        overrides or (),
        proceed=proceed,
        overwrite=overwrite,
        strict=strict,
        trust_import=trust_import,
        language=language,
    )
    if done is None:
        raise typer.Exit(130)
