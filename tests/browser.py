"""Chromium for tests: opened without a window, waited for, and asked by axe what somebody could not use."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="not installed: pip install 'cnclip-ft[test]'")

from selenium import webdriver

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needed = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no chromedriver: apt-get install chromium-driver"),
]
# The package carries axe's script; nothing of the package itself is used.
_AXE = importlib.util.find_spec("axe_playwright_python")


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def until(driver: webdriver.Chrome, script: str):
    end = time.monotonic() + 15
    while not (value := driver.execute_script(script)):
        assert time.monotonic() < end, script
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def width(driver: webdriver.Chrome, pixels: int) -> Iterator[None]:
    size = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@contextlib.contextmanager
def theme(driver: webdriver.Chrome, name: str) -> Iterator[None]:
    """``light`` or ``dark``."""
    wish = {"name": "prefers-color-scheme", "value": name}
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [wish, {"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def axe_findings(driver: webdriver.Chrome) -> list[str]:
    """What axe finds on the page as it is now, ``rule: element``.

    Its rules for levels A and AA of WCAG 2.0 to 2.2 and its best practices: all that are on by themselves, and the size of targets.
    Not those for level AAA, nor experimental or deprecated ones; what axe cannot decide ("incomplete") is no finding.
    """
    if _AXE is None:
        pytest.skip("axe is not installed: pip install 'cnclip-ft[test]'")
    assert _AXE.origin is not None
    if not driver.execute_script("return Boolean(window.axe)"):
        # Through the debugger: the page's own policy lets no script in.
        code = Path(_AXE.origin).with_name("axe.min.js").read_text("utf-8")
        driver.execute_cdp_cmd("Runtime.evaluate", {"expression": code})
    run = """const done = arguments[0]; axe.run(document, {rules: {"target-size": {enabled: true}}})
        .then(r => done(r.violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 160)} ${n.failureSummary}`))),
              e => done([String(e)]))"""
    driver.set_script_timeout(60)
    return driver.execute_async_script(run)
