"""The page as a browser runs it: ask, walk with the keyboard, more like this, a picture of one's own, both languages.

Skipped where there is no Chromium with its driver, or no selenium.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("selenium", reason="not installed: pip install 'cnclip-ft[test]'")
pytest.importorskip("uvicorn", reason="not installed: pip install 'cnclip-ft[serve]'")

import uvicorn
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from cnclip_ft.search.web.api import Limits, make_app
from tests.evaluation import tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no chromedriver: apt-get install chromium-driver"),
]


@pytest.fixture(scope="module")
def engine(index):
    return open_engine(index, device="cpu")


@pytest.fixture(scope="module")
def address(engine):
    with _served(engine) as place:
        yield place


@contextlib.contextmanager
def _served(engine):
    """A live server in a thread; a picture of more than 3,000 bytes is too large for it."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(engine, threshold=0.25, limits=Limits(upload_bytes=3000))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def chromium():
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
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, address):
    chromium.get(address)
    chromium.execute_script("localStorage.setItem('language', 'en')")
    chromium.get("about:blank")
    chromium.get(address)
    until(chromium, "return document.getElementById('about').textContent !== ''")
    chromium.get_log("browser")
    yield chromium
    # Requests the page makes on purpose to be refused are no faults of the page.
    faults = [entry for entry in chromium.get_log("browser") if "Failed to load resource" not in entry["message"]]
    assert not faults


def until(driver, script: str):
    end = time.monotonic() + 15
    while not (value := driver.execute_script(script)):
        assert time.monotonic() < end, script
        time.sleep(0.02)
    return value


def shown(driver) -> list[str]:
    return driver.execute_script("return [...document.querySelectorAll('.card .name')].map(e => e.textContent)")


def settled(driver) -> list[str]:
    until(
        driver,
        "return document.querySelector('#grid').getAttribute('aria-busy') === 'false' && document.querySelector('.card')",
    )
    return shown(driver)


def keys_of(found) -> list[str]:
    return [hit.key for hit in found]


def test_ask_and_see(page, engine):
    assert "What are you looking for" in page.find_element("id", "blank").text
    page.find_element("id", "text").send_keys("一只在雪地里奔跑的狗" + Keys.ENTER)
    (expected,) = engine.ask([Question("一只在雪地里奔跑的狗", top=24)])
    assert settled(page) == keys_of(expected)
    scores = page.execute_script("return [...document.querySelectorAll('.score')].map(e => e.textContent)")
    assert scores == [f"{hit.score:.3f}" for hit in expected]
    until(
        page, "return [...document.images].filter(i => i.loading === 'lazy').slice(0, 6).every(i => i.naturalWidth > 0)"
    )
    assert page.execute_script("return document.activeElement.id") == "text"
    page.find_element("id", "not").send_keys("a red car" + Keys.ENTER)
    (expected,) = engine.ask([Question("一只在雪地里奔跑的狗", without="a red car", top=24)])
    until(page, f"return document.querySelector('.card .name')?.textContent === {expected[0].key!r}")
    assert settled(page) == keys_of(expected)


def test_the_keyboard_is_enough(page, engine):
    page.find_element("css selector", "h1").click()
    page.execute_script("document.activeElement.blur()")
    page.switch_to.active_element.send_keys("/")
    page.switch_to.active_element.send_keys("狗" + Keys.ENTER)
    names = settled(page)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    focused = "return document.activeElement.querySelector('.name')?.textContent"
    assert page.execute_script(focused) == names[1]
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert names.index(page.execute_script(focused)) > 2
    page.switch_to.active_element.send_keys(Keys.ARROW_UP + Keys.ENTER)
    until(page, "return !document.getElementById('chip').hidden")
    number = next(n for n in range(20) if engine.index.key(n) == names[1])
    (expected,) = engine.ask([Question(like=number, top=24)])
    assert settled(page) == keys_of(expected) and names[1] not in shown(page)
    page.back()
    until(page, "return document.getElementById('chip').hidden")
    assert settled(page) == names and page.find_element("id", "text").get_property("value") == "狗"


def test_a_picture_of_ones_own(page, engine, photos_once, tmp_path):
    key = engine.index.key(6)
    page.find_element("id", "file").send_keys(str(photos_once / key))
    assert settled(page)[0] == key
    assert not page.find_element("id", "shareRow").is_displayed()
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    until(page, "return !document.getElementById('shareRow').hidden")
    settled(page)
    (tmp_path / "no.png").write_text("no picture")
    page.find_element("id", "file").send_keys(str(tmp_path / "no.png"))
    until(page, "return !document.getElementById('error').hidden")
    assert "no picture that can be read" in page.find_element("id", "error").text
    (tmp_path / "large.png").write_bytes(tiny.png(3) + bytes(4000))
    page.find_element("id", "file").send_keys(str(tmp_path / "large.png"))
    until(page, "return document.getElementById('error').textContent.includes('too large')")
    page.find_element("id", "chipOff").click()
    settled(page)
    assert not page.find_element("id", "error").is_displayed()


def test_the_threshold_hides_what_is_no_match(page, engine):
    assert page.execute_script("return document.getElementById('limit').value") == "0.25"
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    (found,) = engine.ask([Question("狗", top=24)])
    middle = (found[4].score + found[5].score) / 2
    slide = "const e = document.getElementById('limit'); e.min = -1; e.step = 'any'; e.value = arguments[0]; e.dispatchEvent(new Event('input'))"
    page.execute_script(slide, middle)
    assert shown(page) == keys_of(found[:5]) and "5 of 20" in page.find_element("id", "status").text
    page.execute_script(slide, 1)
    assert shown(page) == [] and "Nothing matches" in page.find_element("id", "blank").text
    page.find_element("id", "measured").click()
    assert page.execute_script("return document.getElementById('limit').value") == "0.25"
    page.find_element("id", "only").click()
    assert len(shown(page)) == 20


def test_both_languages_say_everything(page):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    everything = """return [...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent)
        .map(e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim() || '')"""
    english = page.execute_script(everything)
    page.find_element("id", "language").click()
    assert page.execute_script("return document.documentElement.lang") == "zh-CN"
    chinese = page.execute_script(everything)
    assert all(english) and all(chinese) and len(english) == len(chinese) > 40
    assert "undefined" not in page.page_source.split("<script>")[0]
    assert page.find_element("css selector", "h1").text == "图片搜索" and page.title == "图片搜索"
    page.refresh()
    until(page, "return document.documentElement.lang === 'zh-CN'")


def test_enlarge_and_close(page):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    name = settled(page)[0]
    page.execute_script("document.querySelector('.zoom').click()")
    until(page, "return document.getElementById('largeImage').naturalWidth > 0")
    assert name in page.find_element("id", "largeName").text
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(page, "return !document.getElementById('large').open")


def test_nothing_is_wider_than_the_window(page):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    try:
        for width in (360, 620, 800, 1600):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_words_of_a_name_are_never_markup(page, engine, monkeypatch):
    markup = "<img src=x onerror='window.hacked=1'>"
    monkeypatch.setattr(
        engine.index, "described", lambda number: (markup, {markup: markup, "链接": "javascript:hacked=1"})
    )
    page.find_element("id", "text").send_keys("猫" + Keys.ENTER)
    assert settled(page)[0].startswith("<img")
    page.execute_script("document.querySelector('.zoom').click()")
    until(page, "return document.querySelectorAll('#largeKept dd').length === 2")
    assert page.execute_script("return [window.hacked, document.querySelector('#largeKept a')]") == [None, None]
    page.execute_script("document.getElementById('large').close()")


def test_a_missing_picture_has_a_place(page, engine, monkeypatch):
    monkeypatch.setattr(engine.index, "described", lambda number: (f"gone-{number}.png", {}))
    monkeypatch.setattr(engine.index, "item", lambda number: (f"gone-{number}.png", f"gone{number}"))
    page.get(page.current_url.split("#")[0] + "?fresh")
    page.find_element("id", "text").send_keys("鸟" + Keys.ENTER)
    settled(page)
    # Thumbnails are cached by number, in the server and the browser: at least those not shown before are asked for.
    page.execute_script(
        "document.querySelectorAll('.frame img').forEach(i => { i.loading = 'eager'; i.src = i.src.replace(/images.\\d+/, 'images/999'); })"
    )
    until(page, "return document.querySelectorAll('.gone').length === document.querySelectorAll('.card').length")
    assert page.find_element("css selector", ".gone").text == "The picture is not where it was"


def test_a_server_that_is_gone_is_said(page):
    page.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
        until(page, "return !document.getElementById('error').hidden")
        assert "does not answer" in page.find_element("id", "error").text
    finally:
        page.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})


def test_choosing_by_what_is_kept(chromium, make, checkpoint, tmp_path):
    engine = open_engine(_goods_index(make, checkpoint, tmp_path), device="cpu")
    with _served(engine) as address:
        chromium.get(address)
        until(chromium, "return document.querySelector('#facets select')")
        options = chromium.execute_script(
            "return [...document.querySelectorAll('#facets option')].map(o => o.textContent)"
        )
        assert "女装 (8)" in options and not any("0 (1)" in option for option in options)
        chromium.find_element("id", "text").send_keys("裙" + Keys.ENTER)
        settled(chromium)
        choose = "const s = document.querySelector('#facets select'); s.value = '女装'; s.onchange()"
        chromium.execute_script(choose)
        until(chromium, "return document.querySelectorAll('.card').length === 8")
        kept = chromium.execute_script("return [...document.querySelectorAll('.kept')].map(e => e.textContent)")
        assert len(kept) == 8 and all(text.startswith("女装 · ") and "http" not in text for text in kept)
        chromium.execute_script("document.querySelector('.zoom').click()")
        link = until(chromium, "return document.querySelector('#largeKept a')?.href")
        assert link.startswith("https://x.example/")
        # The address carries the choice.
        chromium.get("about:blank")
        chromium.back()
        until(chromium, "return document.querySelectorAll('.card').length === 8")
        assert chromium.execute_script("return document.querySelector('#facets select').value") == "女装"
        assert not [entry for entry in chromium.get_log("browser") if "Failed to load resource" not in entry["message"]]


def _goods_index(make, checkpoint, tmp_path):
    from tests.search.test_filters import goods

    make(checkpoint, goods(tmp_path / "goods"), tmp_path / "goods.index")
    return tmp_path / "goods.index"
