"""Photographs search page, report and data check for docs/screens/, with what guide.md makes.

    python docs/make_guide.py --folder WORK
    python docs/make_screenshots.py WORK [--into docs/screens]

Needs Chromium with its driver and a Chinese font (in .local/share/fonts of HOME). Every page in both languages, on a desktop and
on a phone, light and dark.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.search_page import server  # noqa: E402
from tests.browser import browser, theme, until  # noqa: E402

COMMAND = [sys.executable, "-m", "cnclip_ft"]
SIZES = {"desktop": (1200, 800, 1), "phone": (390, 780, 1.5)}  # pixels of the page, and of the screen for each
COLOURS = ("light", "dark")
QUESTIONS = {"en": "a night sky with stars", "zh": "夜空"}
LARGEST = 150_000  # bytes


def run(folder: Path, *arguments: object) -> None:
    """A command of the project in `folder`. Exit 1 is a check that found something.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([*COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    if done.returncode > 1:
        sys.exit(f"{arguments}\n{done.stdout}{done.stderr}")


def files(folder: Path) -> dict[tuple[str, str], str]:
    """(page, language) → address of report and check."""
    chinese = folder / "runs" / "chinese"
    if not chinese.exists():  # a finished run that goes on for a step writes its report again
        shutil.copytree(folder / "runs" / "shop", chinese)
        run(folder, "train", chinese / "recipe.yaml", "stages.contrast.steps=401", "--continue", "--language", "zh")
    found = {}
    for language, name in (("en", "shop"), ("zh", "chinese")):
        found["report", language] = (folder / "runs" / name / "report" / "index.html").as_uri()
        check = folder / f"check-{language}.html"
        run(folder, "data", "check", "data/train", "data/valid", "--html", check, "--language", language)
        found["check", language] = check.as_uri()
    return found


def photograph(driver: Any, device: str, file: Path) -> None:
    """What is on the screen."""
    width, height, scale = SIZES[device]
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": device == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    time.sleep(0.5)  # pictures that came into view are loaded
    seen = "i.getBoundingClientRect().top < innerHeight"
    until(driver, f"return [...document.images].filter(i => {seen}).every(i => i.complete)")
    Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB").save(file, quality=80, method=6)
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    if file.stat().st_size > LARGEST:
        sys.exit(f"{file} has {file.stat().st_size:,} bytes, more than {LARGEST:,}")
    print(f"{file}: {file.stat().st_size:,} bytes")


def ask(driver: Any, address: str, language: str, device: str) -> None:
    """The search page with an answer."""
    driver.get(address)
    driver.execute_script("localStorage.setItem('language', arguments[0])", language)
    driver.get("about:blank")
    width, height, scale = SIZES[device]
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": device == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(f"{address}#q={QUESTIONS[language]}")
    until(driver, "return document.querySelectorAll('.card').length > 5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, default=HERE / "screens")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    chosen.into.mkdir(parents=True, exist_ok=True)
    run(folder, "search", "index", "runs/shop/contrast/best", "data/train", "--output", "shop.index")  # with columns
    pages = files(folder)
    with server(str(folder / "shop.index")) as address, browser() as driver:
        for device, colours in product(SIZES, COLOURS):
            with theme(driver, colours):
                for page, language in product(("search", "report", "check"), QUESTIONS):
                    if page == "search":
                        ask(driver, address, language, device)
                    else:
                        driver.get(pages[page, language])
                    photograph(driver, device, chosen.into / f"{page}-{device}-{colours}-{language}.webp")


if __name__ == "__main__":
    main()
