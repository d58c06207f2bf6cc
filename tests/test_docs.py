"""The documentation against the code: pages, twins, links, commands and messages that it names exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cnclip_ft.cli import app
from cnclip_ft.recipe_files import shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
CODE = sorted([*ROOT.glob("cnclip_ft/**/*.py"), *ROOT.glob("data_tools/**/*.py")])
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


def test_pages_that_messages_name_exist():
    for file in CODE:
        for name in re.findall(r"docs/[\w.-]+\.md(?:#[\w-]+)?", file.read_text(encoding="utf-8")):
            page, _, anchor = name.partition("#")
            assert (ROOT / page).is_file(), f"{file}: {name}"
            assert not anchor or anchor in anchors(ROOT / page), f"{file}: {name}"


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


WITHOUT_EXAMPLE = {  # tables, and pages for who changes the code
    "CHANGELOG.md", "CONTRIBUTING.md", "NOTICE.md", "architecture.md", "benchmarks.md", "results.md", "api.md",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_page_has_an_example(page):
    """Those of the guide are run by tests/test_examples.py."""
    if page.name.replace(".zh-CN", "") not in WITHOUT_EXAMPLE:
        text = page.read_text(encoding="utf-8")
        assert "```python" in text or any(line.startswith("cnclip-ft") for line in blocks(page)), page.name


def test_the_screenshots_are_small_and_shown():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = list((ROOT / "docs" / "screens").iterdir())
    assert len(files) == 12
    for file in files:
        assert file.stat().st_size <= 150_000 and f"screens/{file.name}" in text, file.name


def message_texts() -> str:
    """All string constants of the code, with a mark where something is put in, joined where they stand behind one another."""
    found = []
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
    return "\n".join(found)


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    said = message_texts()
    headings = re.findall(r"^### “(.+?)”", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 15
    chinese = (ROOT / "docs/troubleshooting.zh-CN.md").read_text(encoding="utf-8")
    assert headings == re.findall(r"^### “(.+?)”", chinese, re.MULTILINE)
    for words in headings:
        assert words in said, f"no message says “{words}”"
