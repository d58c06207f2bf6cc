"""Every Python file says its idea in its first line, and none of the packages is too long to read in one sitting."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 450


def files(*folders: str) -> dict[str, str]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in found}


def idea(text: str) -> str:
    """The first line, where it is a whole sentence; else nothing."""
    first = re.match(r'(?:#!.*\n)?r?"""(.*[.?:)])(?:"""|\n)', text)
    return first[1] if first else ""


def test_the_first_line_of_every_file_is_a_sentence_that_says_its_idea():
    found = files("cnclip_ft", "data_tools", "tests", "benchmarks")
    assert len(found) > 500
    assert [name for name, text in found.items() if not idea(text)] == []


def test_no_two_files_of_the_packages_have_the_same_idea():
    ideas = [idea(text) for text in files("cnclip_ft", "data_tools").values()]
    assert [each for each in set(ideas) if ideas.count(each) > 1] == []


def test_a_file_of_the_packages_is_read_in_one_sitting():
    lines = {name: text.count("\n") for name, text in files("cnclip_ft", "data_tools").items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
