"""Help, recipes and warnings fit 80 columns, Chinese characters counted as two; `test_every_command` runs the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.cells import cell_len
from typer.testing import CliRunner

import cnclip_ft.cli
from cnclip_ft.recipe_files import find_recipe, shipped_recipes
from data_tools.tables import note


def commands(command: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield names
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*names, name))


ALL = list(commands(typer.main.get_command(cnclip_ft.cli.app)))


def lines(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cnclip_ft.cli.app, list(arguments), prog_name="cnclip-ft")
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def too_wide(said: list[str]) -> list[str]:
    return [line for line in said if cell_len(line) > 80]


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_the_help_of_every_command(names, monkeypatch):
    said = lines(monkeypatch, *names, "-h")
    assert said[0].startswith(" ".join(("Usage: cnclip-ft", *names))) and not too_wide(said)


def test_all_commands_are_met():
    assert len(ALL) > 25 and ("search", "serve") in ALL


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("more", [(), ("--all",)], ids=["as written", "all"])
def test_every_shipped_recipe(name, more, monkeypatch):
    said = lines(monkeypatch, "recipe", "show", name, *more)
    assert "stages:" in said and not too_wide(said)


def test_the_list_of_recipes_cuts_no_sentence(monkeypatch):
    said = lines(monkeypatch, "recipe", "list")
    assert not too_wide(said)
    together = " ".join(" ".join(line.split()[int(line[0] != " ") :]) for line in said)
    for name in shipped_recipes():
        first = find_recipe(name).read_text(encoding="utf-8").partition("\n#\n")[0]
        sentences = " ".join(line.removeprefix("#").strip() for line in first.splitlines())
        assert sentences.endswith(".") and sentences in together, name


def test_a_long_warning_on_standard_error(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    note("WARNING: 192.168.0.1 can be reached from other machines. " + "任何人都能看到索引里的每一张图片 " * 9)
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) > 2 and not too_wide(said.err.splitlines())
