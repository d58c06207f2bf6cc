"""The documentation as pages: what their search finds, typed into a browser. Needs the environment that run_scripts/docs.sh makes."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="not installed: pip install 'cnclip-ft[test]'")

from selenium.webdriver.common.keys import Keys

from tests import browser as browsers

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("DOCS_VENV", ROOT / ".venv-docs")) / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    *browsers.needed,
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment for the pages: bash run_scripts/docs.sh"),
]
TROUBLES = {"en": "troubleshooting", "zh": "troubleshooting.zh-CN"}
# As a terminal shows them, with what the code puts in: signs that a search may take for commands, and common words.
MESSAGES = {
    "runs/shop holds a run already. Continue it with --continue, replace it with --overwrite,": "“holds a run already”",
    "error: photos/spring is neither a store (see `cnclip-ft data build`) nor a folder": "“is neither a store”",
    "--continue": "“--continue goes on with the very same recipe”",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the pages, built as they are now."""
    folder = tmp_path_factory.mktemp("site")
    command = [PYTHON, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium():
    with browsers.browser() as driver:
        yield driver


def ask(driver, words: str) -> list[tuple[float, str, str]]:
    """(score, title, path) of what the search shows: those of the first page found, which Enter goes to, then the others'."""
    put = """const field = document.querySelector('[data-md-component=search-query]'); field.focus(); field.value = arguments[0];
        field.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}))"""
    shown = "return document.querySelectorAll('.md-search-result__item').length"
    driver.execute_script(put, "")
    browsers.until(driver, f"{shown} === 0")
    driver.execute_script(put, words)
    browsers.until(driver, shown)
    found = driver.execute_script("""return [...document.querySelectorAll('.md-search-result__item')].map(item =>
        [...item.querySelectorAll('a')].map(a => [Number(a.querySelector('article').dataset.mdScore),
            a.querySelector('h1, h2').textContent.replaceAll('\\u200b', ''), new URL(a.href).pathname])
        .sort((a, b) => b[0] - a[0]))""")
    return [tuple(hit) for page in found for hit in page]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_search_finds_the_entry_of_a_message_in_the_language_of_the_page(site, chromium, language):
    text = (ROOT / "docs" / f"{TROUBLES[language]}.md").read_text(encoding="utf-8")
    headings = [heading.replace("`", "") for heading in re.findall(r"^### (.+)$", text, re.MULTILINE)]
    folder = "/zh-CN" if language == "zh" else ""
    chromium.get_log("browser")
    chromium.get(f"{site}{folder}/index.html")
    asked = {heading.strip("“”"): heading for heading in headings}
    assert len(asked) > 45
    for words, entry in {**asked, **MESSAGES}.items():
        hits = ask(chromium, words)
        assert hits[0][1:] == (entry, f"{folder}/troubleshooting.html"), f"{words}: {hits[:3]}"
        assert {path.startswith("/zh-CN/") for _, _, path in hits} == {language == "zh"}, words
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_that_was_found_marks_the_long_words_of_the_question(site, chromium):
    chromium.get(f"{site}/index.html")
    assert chromium.current_url == f"{site}/index.html"
    ask(chromium, "the run there is finished")
    chromium.switch_to.active_element.send_keys(Keys.ENTER)
    browsers.until(chromium, "return document.querySelector('article mark')")
    assert chromium.current_url.endswith("#the-run-there-is-finished")
    marks = chromium.execute_script("return [...document.querySelectorAll('article mark')].map(m => m.textContent)")
    assert {word.lower() for word in marks} == {"there", "finished"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_in_one_language_alone_are_found_from_both(site, chromium, language):
    folder = "/zh-CN" if language == "zh" else ""
    chromium.get(f"{site}{folder}/index.html")
    for words, page in (("Architecture", "architecture"), ("cnclip_ft.load", "api")):
        assert f"{folder}/{page}.html" in {path for _, _, path in ask(chromium, words)}, words
