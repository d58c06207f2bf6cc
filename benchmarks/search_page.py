"""Pictures of the search page, as a browser draws it: wide and narrow, light and dark.

    cnclip-ft data demo demo --train 6000 --valid 400        and a model trained on it (run_scripts/quickstart.sh)
    cnclip-ft search index runs/quickstart/contrast/best demo/valid --output demo.index
    python benchmarks/search_page.py demo.index --threshold calibration.json --output docs/search.png

    python benchmarks/search_page.py --measure       how soon 100,000 pictures' page shows something, and what it weighs

`docs/search.png` is the wide, light one. `--all FOLDER` draws the four of them, and the other states, to look at.
Needs the extra `test` (selenium), Chromium and its driver.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUESTION = "夜空下的红色小鱼"


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


def browser(width: int, height: int, dark: bool = False, language: str = "zh-CN") -> Any:
    """A headless Chromium through selenium, which is told where both programs lie: else it asks the network."""
    import shutil

    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--lang={language}",
        "--force-device-scale-factor=1",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.binary_location = next(filter(None, map(shutil.which, CHROMIUM)), "")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setLocaleOverride", {"locale": language})
    return driver


def ask(driver: Any, address: str, question: str) -> None:
    """Open the page, ask, and wait until every thumbnail in sight is there."""
    driver.get(address)
    box = driver.find_element("id", "text")
    box.send_keys(question + "\n")
    until(driver, "return document.querySelectorAll('.card').length > 0")
    until(
        driver,
        "return [...document.images].filter(i => i.loading === 'lazy' && i.getBoundingClientRect().top < innerHeight)"
        ".every(i => i.complete && i.naturalWidth > 0)",
    )


def until(driver: Any, script: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not driver.execute_script(script):
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds} s: {script}")
        time.sleep(0.05)


def keep(driver: Any, path: Path) -> None:
    """As a PNG of at most 256 colours: a third of the bytes, and no difference to the eye."""
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}  {image.width}×{image.height}  {path.stat().st_size / 1e3:.0f} kB")


def measure(images: int = 100_000, visits: int = 5) -> None:
    """First content and page weight over loopback. The model is tiny: nothing of it is in what is measured."""
    from search import make_index

    with tempfile.TemporaryDirectory() as folder, server(str(make_index(Path(folder), images, "tiny"))) as address:
        driver = browser(1280, 860)
        try:
            firsts = []
            for _ in range(visits):
                driver.execute_cdp_cmd("Network.clearBrowserCache", {})
                driver.get(address)
                until(driver, "return document.getElementById('about').textContent !== ''")
                until(driver, "return performance.getEntriesByName('first-contentful-paint').length > 0")
                firsts.append(
                    driver.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
                )
            ask(driver, address, QUESTION)
            loaded = driver.execute_script(
                "return [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                ".map(e => [e.name, e.transferSize])"
            )
        finally:
            driver.quit()
    weight = sum(size for name, size in loaded if "/api/images/" not in name)
    print(
        f"{images:,} pictures: first content {statistics.median(firsts):.0f} ms (worst of {visits}: {max(firsts):.0f}; target 500), "
        f"{weight / 1e3:.1f} kB without thumbnails (target 150)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", nargs="?")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--threshold")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.measure:
        return measure()
    if args.index is None:
        parser.error("name an index, or say --measure")
    with server(args.index, *(["--threshold", args.threshold] if args.threshold else [])) as address:
        if args.output:
            driver = browser(1280, 860)
            ask(driver, address, args.question)
            keep(driver, args.output)
            driver.quit()
        if args.all:
            args.all.mkdir(parents=True, exist_ok=True)
            for width, height, name in ((1280, 860, "wide"), (390, 844, "narrow")):
                for dark in (False, True):
                    driver = browser(width, height, dark, "en-US" if dark else "zh-CN")
                    ask(driver, address, args.question)
                    keep(driver, args.all / f"{name}-{'dark' if dark else 'light'}.png")
                    driver.find_element("css selector", ".card").send_keys("\n")
                    until(driver, "return !document.getElementById('chip').hidden && document.querySelector('.card')")
                    time.sleep(0.6)
                    keep(driver, args.all / f"{name}-{'dark' if dark else 'light'}-like.png")
                    driver.get(address + "#")
                    driver.refresh()
                    time.sleep(0.3)
                    keep(driver, args.all / f"{name}-{'dark' if dark else 'light'}-start.png")
                    driver.quit()


if __name__ == "__main__":
    main()
