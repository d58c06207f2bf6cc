"""What the pages need beyond Markdown: links that work in the repository too, and no warning where none is meant.

A link to the other language or out of ``docs/`` is right where the files are read as they lie. On the pages the language is
switched above, and what lies outside is no page: such a link becomes its own words. Chinese lines are joined without a blank.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

_OUT = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
_SWITCH = re.compile(r"^\[(?:中文|English)\]\([\w.-]+\.md\)\n+", re.MULTILINE)
# A line that ends and one that begins with a Chinese character: between words there is no blank in Chinese.
_BROKEN = re.compile(r"(?<=[\u2e80-\u9fff\uff00-\uffef])\n(?=[\u2e80-\u9fff\uff00-\uffef])")
_CHINESE = re.compile(r"\]\(([\w-]+)\.zh-CN\.md(#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Markdown as it stands in the repository → as the pages take it."""
    markdown = _BROKEN.sub("", _SWITCH.sub("", markdown))
    return _CHINESE.sub(r"](\1.md\2)", _OUT.sub(r"\1", markdown))


def on_post_build(config: Any, **_: Any) -> None:
    """The theme asks for the list of pages beside the pages of every language; it is written once."""
    site = Path(config["site_dir"])
    if (site / "zh-CN").is_dir():
        shutil.copyfile(site / "sitemap.xml", site / "zh-CN" / "sitemap.xml")
