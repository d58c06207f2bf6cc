"""How soon the search page of 100,000 pictures shows something on loopback, and what it weighs.

    python benchmarks/search_page.py [--images 100000]

Needs the extra `test` (selenium), Chromium and its driver. Pictures of the page are made by docs/make_screenshots.py.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.browser import browser, until  # noqa: E402


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[str]:
    """`cnclip-ft search serve` on a free port; its address."""
    command = [sys.executable, "-m", "cnclip_ft", "search", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        said = iter(process.stdout.readline, "")
        line = next((line for line in said if "http://" in line), "nothing was said")
        found = re.search(r"http://\S+", line)
        if not found:
            raise SystemExit(f"the server did not start: {line}")
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


def measure(images: int, visits: int = 5) -> None:
    """First content and page weight over loopback. The model is tiny: nothing of it is in what is measured."""
    from search import make_index

    with tempfile.TemporaryDirectory() as folder, server(str(make_index(Path(folder), images, "tiny"))) as address:
        with browser() as driver:
            firsts = []
            for _ in range(visits):
                driver.execute_cdp_cmd("Network.clearBrowserCache", {})
                driver.get(address)
                until(driver, "return document.getElementById('about').textContent !== ''")
                until(driver, "return performance.getEntriesByName('first-contentful-paint').length > 0")
                firsts.append(
                    driver.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
                )
            driver.find_element("id", "text").send_keys("夜空下的红色小鱼\n")
            until(driver, "return document.querySelectorAll('.card').length > 0")
            loaded = driver.execute_script(
                "return [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                ".map(e => [e.name, e.transferSize])"
            )
    weight = sum(size for name, size in loaded if "/api/images/" not in name)
    print(
        f"{images:,} pictures: first content {statistics.median(firsts):.0f} ms (worst of {visits}: {max(firsts):.0f}; target 500), "
        f"{weight / 1e3:.1f} kB without thumbnails (target 150)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    measure(parser.parse_args().images)


if __name__ == "__main__":
    main()
