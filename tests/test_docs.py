"""The documentation against the code: pages, twins, links, commands and messages that it names exist."""

import ast
import configparser
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import typer.main

from cnclip_ft.cli import app
from cnclip_ft.commands import sections
from cnclip_ft.recipe_files import shipped_recipes
from cnclip_ft.recipe_keys import keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
CODE = sorted([*ROOT.glob("cnclip_ft/**/*.py"), *ROOT.glob("data_tools/**/*.py")])
NOT_PYTHON = sorted(
    [
        *ROOT.glob("cnclip_ft/**/*.yaml"),
        *ROOT.glob("cnclip_ft/**/*.js"),
        *ROOT.glob("run_scripts/*.sh"),
        *ROOT.glob("examples/*"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "Dockerfile",
        ROOT / "setup.cfg",
    ]
)
PROSE = {"as", "evaluation", "may", "nor", "wrote"}  # words that stand behind the command's name in a sentence
BOTH_IN_ONE = {"benchmarks.md", "results.md"}  # tables with a line in each language
FOR_BUILDERS = {"architecture.md", "store-format.md", "CHANGELOG.md", "NOTICE.md"}  # of the code, in English


def lines(shell: str) -> list[str]:
    """The commands of a shell block, lines joined that end in a backslash."""
    return [line.strip() for line in shell.replace("\\\n", " ").splitlines()]


def blocks(page: Path) -> list[str]:
    """The commands of a page's shell blocks."""
    text = page.read_text(encoding="utf-8")
    return lines("\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)))


def command_lines() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for line in blocks(page):
            for part in re.split(r"&&|\|(?!\|)", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:
                    continue  # a sentence, not a command
                if "cnclip-ft" in words[:1]:
                    found.append((page.name, words[1:]))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if not p.name.endswith(".zh-CN.md")], ids=lambda p: p.name)
def test_every_page_has_its_twin_with_the_same_sections(page):
    if page.name in BOTH_IN_ONE | FOR_BUILDERS:
        return
    twin = page.with_name(f"{page.stem}.zh-CN.md")
    assert twin.is_file(), f"{page.name} exists in English alone"
    shape = [
        re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", p.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
        for p in (page, twin)
    ]
    assert shape[0] == shape[1], f"{page.name} and {twin.name} have other headings"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation off, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}, which has {sorted(anchors(place))}"


def test_pages_that_the_code_names_exist():
    """In messages, comments, recipes, scripts, the notebook; with their sections."""
    found = 0
    for file in [*CODE, *NOT_PYTHON]:
        for name in re.findall(r"docs/[\w.-]+\.md(?:#[\w-]+)?", file.read_text(encoding="utf-8")):
            page, _, anchor = name.partition("#")
            assert (ROOT / page).is_file(), f"{file}: {name}"
            assert not anchor or anchor in anchors(ROOT / page), (
                f"{file}: {name}, which has {sorted(anchors(ROOT / page))}"
            )
            found += 1
    assert found > 20


def test_a_message_that_names_a_page_names_its_section():
    found = re.findall(r"docs/[\w.-]+\.md(?:#[\w-]+)?", message_texts(docstrings=False))
    assert len(found) >= 5
    assert [name for name in found if "#" not in name and name != "docs/recipe.md"] == []


def test_what_messages_advise_exists():
    """Commands, their options, and extras; what a style sheet or a shell says is none of them."""
    tree = typer.main.get_command(app)
    commands = [(), *((name,) for name in tree.commands)]
    commands += [(name, sub) for name, group in tree.commands.items() for sub in getattr(group, "commands", ())]
    options, groups = {"--help"}, {name for name, group in tree.commands.items() if hasattr(group, "commands")}
    for path in commands:
        command = tree
        for name in path:
            command = command.commands[name]
        for parameter in command.params:
            options |= {*parameter.opts, *parameter.secondary_opts}
    foreign = {
        "--shm-size",
        "--sparse",
        "--dereference",
        "--use-augment",
        "--local-dir",
    }  # of docker, tar, the official script, hf
    said = message_texts(style=False)
    advised = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", said))
    assert len(advised) > 60 and advised - options - foreign == set()
    for words in re.findall(r"cnclip-ft ([a-z]+(?: [a-z]+)?)", said):
        first, _, second = words.partition(" ")
        if first in PROSE:
            continue
        assert (first,) in commands, f"cnclip-ft {words}"
        assert first not in groups or not second or (first, second) in commands, f"cnclip-ft {words}"
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = {name for names in re.findall(r"cnclip-ft\[([\w,]+)\]", said) for name in names.split(",")}
    assert len(extras) > 8 and extras <= set(setup["options.extras_require"])


def test_commands_and_options_of_the_pages_exist():
    lines, tree = command_lines(), typer.main.get_command(app)
    assert len(lines) > 60
    for page, words in lines:
        command, path = tree, []
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            if words[0] in ("…", "..."):
                break
            assert words[0] in command.commands, f"{page}: cnclip-ft {' '.join([*path, words[0]])}"
            path.append(words[0])
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        known |= {"--help", "-h", "--version"}
        for word in words:
            option = word.split("=")[0]
            if re.fullmatch(r"--[a-z][\w-]*", option):
                assert option in known, f"{page}: cnclip-ft {' '.join(path)} has no {option}"


def test_shipped_recipes_named_in_the_pages_exist():
    shipped = set(shipped_recipes())
    for page, words in command_lines():
        if words[:1] in (["train"], ["plan"]) and len(words) > 1 and re.fullmatch(r"[a-z0-9_-]+", words[1]):
            assert words[1] in shipped, f"{page}: {words[1]}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_every_page_says_when_to_use_what(page):
    name = page.name.replace(".zh-CN", "")
    if name == "index.md":  # a table of just that
        return
    leads = ["**When to use what.**", "**什么时候用什么。**"]
    for lead in leads if name in BOTH_IN_ONE else leads[1:] if page.name != name else leads[:1]:
        (said,) = re.findall(
            rf"^{re.escape(lead)}\s*(.*?)\n\n", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        assert len(re.findall(r"`[^`]+`|\]\(", said)) >= 2, f"{page.name}: {said} names nothing to use"


WITHOUT_EXAMPLE = {  # tables, and pages for who changes the code
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "NOTICE.md",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_page_has_an_example(page):
    """Those of the guide are run by tests/test_examples.py."""
    if page.name.replace(".zh-CN", "") not in WITHOUT_EXAMPLE:
        text = page.read_text(encoding="utf-8")
        assert "```python" in text or any(line.startswith("cnclip-ft") for line in blocks(page)), page.name


def test_the_screenshots_are_small_and_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = list((ROOT / "docs" / "screens").iterdir())
    kinds = product(("search", "report", "check"), ("desktop", "phone"), ("light", "dark"), ("en", "zh"))
    assert {file.name for file in files} == {f"{'-'.join(kind)}.webp" for kind in kinds}
    for file in files:
        assert file.stat().st_size <= 150_000 and f"screens/{file.name}" in text, file.name


def message_texts(*, docstrings: bool = True, style: bool = True) -> str:
    """All string constants of the code, with a mark where something is put in, joined where they stand behind one another."""
    found = []
    for file in CODE:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)} if not docstrings else set()
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
    return "\n".join(text for text in found if style or not re.search(r"var\(--|:root \{", text))


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    said = message_texts()
    headings = re.findall(r"^### “(.+?)”", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) >= 40
    chinese = (ROOT / "docs/troubleshooting.zh-CN.md").read_text(encoding="utf-8")
    assert headings == re.findall(r"^### “(.+?)”", chinese, re.MULTILINE)
    for words in headings:
        assert words in said, f"no message says “{words}”"
    assert tuple(headings) == sections.WORDS  # what errors point at
    for page, language in (("troubleshooting.md", "en"), ("troubleshooting.zh-CN.md", "zh")):
        for words in headings:
            pointed = sections.section_for(f"somewhere: … {words} …", language)
            assert pointed is not None and pointed.startswith(f"docs/{page}#")
            assert pointed.partition("#")[2] in anchors(ROOT / "docs" / page), pointed


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_error_that_advises_points_at_a_section_that_exists(language):
    """Of every command, for an option; of every key of a recipe."""
    commands = [(*group.split(), "x") for group in sections.COMMANDS]
    said = [sections.section_for("it is there: --overwrite", language, given) for given in commands]
    said += [
        sections.section_for(f"too many: {key.path.replace('[]', '.0')}=3", language, ["train"])
        for key in keys()
        if "." in key.path
    ]
    for pointed in said:
        assert pointed is not None
        page, _, section = pointed.partition("#")
        assert section in anchors(ROOT / page), pointed
        assert page.endswith(".zh-CN.md") == (language == "zh")
    below = {name for name in ("data", "search", "recipe")}
    top = {command.name or command.callback.__name__ for command in app.registered_commands} | below
    assert top <= {group.split()[0] for group in sections.COMMANDS}
    assert sections.section_for("the disk is full", language, ["train"]) is None
