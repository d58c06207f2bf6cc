"""`cnclip-ft recipe`: the shipped recipes, a file of one's own, and every key with its meaning."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from cnclip_ft.commands.train import Overrides, RecipeName
from data_tools.tables import say

app = typer.Typer(
    help="See the shipped recipes, begin one of your own, look up keys.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_() -> None:
    """The recipes that are shipped, and what they are for.

    Example: cnclip-ft recipe list
    """
    from cnclip_ft.recipe_files import find_recipe, shipped_recipes
    from data_tools.tables import table, terminal_width

    rows = []
    for name in shipped_recipes():
        lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
        first = takewhile(lambda line: line.strip("# "), lines)  # the paragraph it begins with
        rows.append([name, " ".join(line.lstrip("# ") for line in first)])
    say(table(["recipe", "what it is for"], rows, text=(0, 1), width=terminal_width()))


@app.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="Every setting spelt out, defaults too.")] = False,
) -> None:
    """A recipe as it is written; with --all or settings to override, as a run would have it.

    Example: cnclip-ft recipe show demo --all
    """
    from cnclip_ft.calls import read_recipe
    from cnclip_ft.recipe import dump_recipe
    from cnclip_ft.recipe_files import example, find_recipe, load_recipe

    # Rules choose by the data that is named; where none is, as for the 10,000 pairs of 2,000 pictures of an example.
    read = read_recipe(recipe, overrides) if overrides else load_recipe(recipe, look=example)
    if every or overrides:
        typer.echo(dump_recipe(read), nl=False)
    else:
        typer.echo(find_recipe(recipe).read_text(encoding="utf-8-sig"), nl=False)


@app.command()
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write, e.g. mine.yaml.")],
    begin: Annotated[
        str, typer.Option("--from", metavar="RECIPE", help="What it begins as: a shipped recipe, or a file.")
    ] = "flickr30k-cn_vit-b-16",
) -> None:
    """Begin a recipe of your own: a copy to edit.

    Example: cnclip-ft recipe new mine.yaml --from two-stages_vit-b-16_roberta
    """
    import os
    import shlex

    from cnclip_ft.recipe_files import example, find_recipe, load_recipe
    from data_tools.atomic import whole_file
    from data_tools.errors import RequestError

    if file.suffix not in (".yaml", ".yml"):
        raise RequestError(f"{file}: a recipe ends in .yaml: cnclip-ft recipe new {shlex.quote(f'{file}.yaml')}")
    if os.path.lexists(file):
        raise RequestError(f"{file} is there already; choose another name")
    load_recipe(begin, look=example)  # a file that is none would only be refused later
    text = find_recipe(begin).read_text(encoding="utf-8-sig")
    with whole_file(file, "w") as written:
        written.write(text)
    say(f"{file}: begun as {begin}. Edit it, see what it would do with: cnclip-ft plan {shlex.quote(str(file))}")


@app.command()
def keys(
    word: Annotated[str, typer.Argument(metavar="[WORD]", help="Only keys in whose path or meaning this is.")] = "",
    language: Annotated[str, typer.Option(help="en or zh.")] = "en",
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/recipe.md, whole.")] = False,
) -> None:
    """Every key of a recipe: type, default, meaning.

    Example: cnclip-ft recipe keys augment
    """
    from cnclip_ft import recipe_reference
    from data_tools.errors import RequestError
    from data_tools.tables import table, terminal_width
    from data_tools.words import language_of

    language_of(language)
    if markdown:
        typer.echo(recipe_reference.page(language), nl=False)
        return
    rows = recipe_reference.rows(language, word)
    if not rows:
        raise RequestError(f"no key has {word!r} in its path or meaning: cnclip-ft recipe keys")
    say(table(recipe_reference.heads(language), rows, text=(0, 1, 2, 3), width=terminal_width()))
