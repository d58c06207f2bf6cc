"""The page as it is served: one file without anything to fetch, put together from markup, looks, words and script."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def read_page() -> str:
    """The whole page; style and script stand in it, so that their hashes can be allowed (`guard.content_policy`)."""

    def part(name: str) -> str:
        return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")

    script = f'"use strict";\n{part("words.js")}{part("page.js")}'
    return part("page.html").replace("/* page.css */", part("page.css")).replace("/* page.js */", script)
