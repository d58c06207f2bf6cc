"""Recipes from files: found by path or shipped name, ``key.path=value`` over single settings, every fault in words."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cnclip_ft.new_towers import fault_lines, short
from cnclip_ft.recipe import ModelSection, Recipe
from cnclip_ft.recipe_data import DataSection
from cnclip_ft.recipe_facts import EXAMPLE, NAME, Facts, facts_line
from cnclip_ft.recipe_keys import concrete, is_known, is_plain, keys_at, meant
from cnclip_ft.recipe_rules import choose, filled
from cnclip_ft.yaml_file import parse_yaml, read_yaml
from data_tools.errors import RequestError

SHIPPED = Path(__file__).with_name("recipes")
Look = Callable[[ModelSection, DataSection], Facts]  # at what the rules of a recipe choose by


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """A path as it is, or the name of a shipped recipe with or without ``.yaml``."""
    path = Path(name)
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    try:
        if path.is_file():
            return path
        if len(path.parts) == 1 and shipped.is_file():
            return shipped
        folder = path.is_dir()
    except (OSError, ValueError):  # a name too long, with NUL, links in a circle
        folder = False
    if folder:
        raise RequestError(f"{name} is a folder; name the recipe file in it, e.g. {path / 'recipe.yaml'}")
    close = difflib.get_close_matches(path.name.removesuffix(".yaml"), shipped_recipes(), n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    raise RequestError(
        f"{str(name)[:200]}: no such recipe file.{guess} Shipped recipes: {', '.join(shipped_recipes())}"
    )


def load_recipe(name: str | Path, overrides: list[str] | None = None, look: Look | None = None) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        look: called where the recipe has `rules`, which choose by what it finds.

    Raises:
        RequestError: naming the file, the key, what was found and what is expected.
    """
    path = find_recipe(name)
    content, stages, left = _read(path, overrides or [])
    try:
        return checked_recipe(content, look)
    except RequestError as error:
        there = [override for override in overrides or [] if override not in left]
        lines = "\n".join(f"  {line}" for line in _misplaced(there, stages))
        said = f"this recipe cannot be run:\n{lines}" if lines else str(error)
        raise RequestError(f"{path}: {said}") from None


def _read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The content of a recipe with settings put over it, the names of its stages, and the settings that leave a stage out."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RequestError(f"{path}: a recipe is a mapping with model, data and stages; found {type(content).__name__}")
    stages = list(content["stages"]) if isinstance(content.get("stages"), dict) else []
    left: dict[str, str] = {}
    for override in overrides:
        where = override.partition("=")[0].split(".")
        if where[0] == "stages" and len(where) > 2 and where[1] in left:
            raise RequestError(f"{override!r}: {left[where[1]]} leaves that stage out; take one of both away")
        _override(content, override)
        if where[0] != "stages" or len(where) != 2:
            continue
        name = where[1]  # a whole stage
        if content["stages"][name] is None and name in stages:  # left out
            if len(stages) == 1:
                raise RequestError(f"{override!r}: no stage is left; a recipe has one or more")
            del content["stages"][name]
            left[name] = override
            stages = [each for each in stages if each != name]
        elif isinstance(content["stages"][name], dict):
            stages.append(name)
    return content, stages, list(left.values())


def begun_with_rules(name: str | Path, overrides: list[str]) -> Path | None:
    """Of a recipe with rules that was begun in its output folder: the recipe there, which says what was chosen; else None."""
    content, *_ = _read(find_recipe(name), overrides)
    if content.get("rules") != NAME:
        return None
    begun = Path(str(content.get("output") or Recipe.model_fields["output"].default)) / "recipe.yaml"
    return begun if begun.is_file() else None


def example(_model: ModelSection, _data: DataSection) -> Facts:
    """Stands for data, where a recipe is only looked at."""
    return EXAMPLE


def _chosen(content: Mapping[str, Any], look: Look | None) -> tuple[dict[str, Any], list[str]]:
    """The content with what its rules choose, and what they say."""
    if look is None:
        raise RequestError(
            f"rules={NAME}: settings follow from the data, and nothing looked at it; give them, or rules=null"
        )
    stages = content.get("stages")
    try:
        facts = look(ModelSection.model_validate(content.get("model")), DataSection.model_validate(content.get("data")))
    except ValidationError:  # said with all that is wrong, where the whole is checked
        facts = EXAMPLE
    if not isinstance(stages, Mapping):
        return {**content, "rules": None}, []
    chosen = choose(facts, stages)
    return {**content, "rules": None, "stages": filled(stages, chosen)}, [
        facts_line(facts),
        *(choice.line() for choice in chosen),
    ]


def checked_recipe(content: dict[str, Any], look: Look | None = None) -> Recipe:
    """A recipe from its content; `look` as for `load_recipe`.

    Raises:
        RequestError: naming every key that is wrong.
    """
    reasons: list[str] = []
    if content.get("rules") == NAME:
        content, reasons = _chosen(content, look)
    try:
        return Recipe.model_validate(content).with_reasons(reasons)
    except ValidationError as error:
        stages = list(content["stages"]) if isinstance(content.get("stages"), dict) else []
        lines = fault_lines(error, known=lambda where, _: _known(where, stages))
        raise RequestError("this recipe cannot be run:\n" + "\n".join(f"  {line}" for line in lines)) from None


def complete_override(name: str | None, begun: str) -> list[str]:
    """Overrides that begin so, for the shell: keys of the recipe, and the words a key may be."""
    try:
        content = read_yaml(find_recipe(name or ""))
        stages = list(content["stages"])
    except (RequestError, TypeError, KeyError):
        stages = []
    offered = []
    for path, key in concrete(stages):
        offered += [f"{path}={word}" for word in key.words or [""]]
    return [each for each in offered if each.startswith(begun)]


def _override(content: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    *parents, last = key.split(".")
    if not sign or not all((*parents, last)):
        raise RequestError(f"{override!r} is not key.path=value, e.g. stages.align.batch_size=256")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise RequestError(f"{override!r}: the value is not YAML: {error}. Put a text in quotes.") from None
    place: Any = content
    for number, parent in enumerate(parents):
        rest = [*parents[number + 1 :], last]
        at: Any = parent if isinstance(place, dict) else int(parent)
        found = place.setdefault(at, {}) if isinstance(place, dict) else place[at]
        inner = place[at] = _spelled_out(parents[: number + 1], found, rest)
        if isinstance(inner, list):
            if not (rest[0].isascii() and rest[0].isdigit() and int(rest[0]) < len(inner)):
                raise RequestError(f"{override!r}: {parent} is a list; its entries are 0 to {len(inner) - 1}")
        elif not isinstance(inner, dict):
            raise RequestError(f"{override!r}: {parent} is not a section, it holds {short(inner)}")
        place = inner
    place[last if isinstance(place, dict) else int(last)] = parsed


def _spelled_out(where: list[str], found: Any, rest: list[str]) -> Any:
    """A store of `data.train` that is its path alone, as the entry or list of entries of which `rest` is a setting."""
    if isinstance(found, str) and where == ["data", "train"] and rest[0] == "0":
        return [found]
    if isinstance(found, str) and where[:-1] == ["data", "train"]:
        return {"store": found}
    return found


def _misplaced(overrides: list[str], stages: list[str]) -> list[str]:
    """Of a recipe that cannot be run: overrides that name no key of it, each with the line to type instead."""
    lines = []
    for override in overrides:
        key, _, value = override.partition("=")
        where = key.split(".")
        if where[0] == "stages" and len(where) > 1 and where[1] not in stages:
            what = f"there is no stage '{where[1]}'; the stages are {', '.join(stages)}"
        elif (plain := next((above for above in _above(where) if is_plain(above)), None)) is not None:
            lines.append(f"{key}: {'.'.join(plain)} has nothing inside, it is a value: {'.'.join(plain)}={value}")
            continue
        elif not is_known(where):
            what = "unknown key"
        else:
            continue
        likely = _likely(where, stages, value)
        lines.append(f"{key}: {what}" + (f". Did you mean {likely}?" if likely else _known_here(where)))
    return lines


def _above(where: list[str]) -> list[list[str]]:
    return [where[:count] for count in range(1, len(where))]


def _known(where: list[str], stages: list[str]) -> str:
    likely = _likely(where, stages, None)
    return f". Did you mean {likely}?" if likely else _known_here(where)


def _likely(where: list[str], stages: Iterable[str], value: str | None) -> str:
    return " or ".join(path if value is None else f"{path}={value}" for path in meant(where, stages))


def _known_here(where: list[str]) -> str:
    names = keys_at(where[:-1])
    return f"; known here: {', '.join(names)}" if names else ""
