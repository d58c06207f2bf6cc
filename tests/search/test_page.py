"""The page as a browser runs it: ask, walk with the keyboard, more like this, a picture of one's own, both languages.

Skipped where there is no Chromium with its driver, or no selenium.
"""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("uvicorn", reason="not installed: pip install 'cnclip-ft[serve]'")

pytest.importorskip("selenium", reason="not installed: pip install 'cnclip-ft[test]'")

from selenium.webdriver.common.keys import Keys

from cnclip_ft.grounding.finder import decode
from cnclip_ft.search.engine.engine import open_engine
from cnclip_ft.search.engine.query import Question
from tests import browser as browsers
from tests.browser import until
from tests.evaluation import tiny
from tests.search.served import served, settled, shown

pytestmark = browsers.needed


@pytest.fixture(scope="module")
def engine(index):
    return open_engine(index, device="cpu")


@pytest.fixture(scope="module")
def address(engine):
    with served(engine) as place:
        yield place


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
    number = next(n for n in range(20) if engine.gallery.index.key(n) == names[1])
    (expected,) = engine.ask([Question(like=number, top=24)])
    assert settled(page) == keys_of(expected) and names[1] not in shown(page)
    page.back()
    until(page, "return document.getElementById('chip').hidden")
    assert settled(page) == names and page.find_element("id", "text").get_property("value") == "狗"


def test_a_picture_of_ones_own(page, engine, photos_once, tmp_path):
    key = engine.gallery.index.key(6)
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
    until(page, "return document.querySelectorAll('.card').length === 5")
    assert shown(page) == keys_of(found[:5]) and "5 of 20" in page.find_element("id", "status").text
    page.execute_script(slide, 1)
    until(page, "return !document.querySelector('.card')")
    assert "Nothing matches" in page.find_element("id", "blank").text
    page.find_element("id", "measured").click()
    assert page.execute_script("return document.getElementById('limit').value") == "0.25"
    page.find_element("id", "only").click()
    until(page, "return document.querySelectorAll('.card').length === 20")
    assert "20 of 20" in page.find_element("id", "status").text
    page.find_element("id", "only").click()
    until(page, "return document.querySelectorAll('.card').length < 20")
    # A picture asks: the threshold was not measured for it.
    page.execute_script("document.querySelectorAll('.card').length || document.getElementById('only').click()")
    until(page, "return document.querySelector('.card')")
    page.execute_script("document.querySelector('.card').click()")
    until(page, "return document.querySelectorAll('.card').length === 19")
    assert not page.find_element("id", "threshold").is_displayed() and page.find_element("id", "off").is_displayed()
    assert page.execute_script("return document.querySelectorAll('.weak').length") == 0


def test_both_languages_say_everything(page):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    everything = """return [...document.querySelectorAll('button, input, select')].filter(e => e.offsetParent)
        .map(e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim() || '')"""
    english = page.execute_script(everything)
    page.find_element("id", "language").click()
    assert page.execute_script("return document.documentElement.lang") == "zh-CN"
    chinese = page.execute_script(everything)
    assert all(english) and all(chinese) and len(english) == len(chinese) >= 46
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


LAID = """const c = document.getElementById('heat'), i = document.getElementById('largeImage');
const a = c.getBoundingClientRect(), b = i.getBoundingClientRect();
return c.hidden ? null : [a.left - b.left, a.top - b.top, a.width, a.height, b.width, b.height, i.naturalWidth, i.naturalHeight];"""


def test_where_the_question_is_met_lies_over_the_picture(page, engine):
    page.execute_script("localStorage.removeItem('heat')")
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    page.execute_script("document.querySelector('.zoom').click()")
    until(page, "return document.getElementById('largeImage').naturalWidth > 0")
    toggle = page.find_element("id", "heatOn")
    assert page.execute_script(LAID) is None and toggle.get_attribute("aria-pressed") == "false"
    toggle.click()
    until(page, "return !document.getElementById('heat').hidden")
    left, top, wide, tall, whole_wide, whole_tall, natural_wide, natural_tall = page.execute_script(LAID)
    scale = min(whole_wide / natural_wide, whole_tall / natural_tall)
    assert (wide, tall) == pytest.approx((natural_wide * scale, natural_tall * scale), abs=1.5)
    assert (left, top) == pytest.approx(((whole_wide - wide) / 2, (whole_tall - tall) / 2), abs=1.5)
    # what is drawn is hottest where the map is
    bright = page.execute_script(
        """const c = document.getElementById('heat'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        let best = -1, at = 0;
        for (let i = 0; i < d.length; i += 4) if (d[i + 1] > best) { best = d[i + 1]; at = i / 4; }
        return [(at % c.width + .5) / c.width, (Math.floor(at / c.width) + .5) / c.height];"""
    )
    (first,) = engine.ask([Question("狗", top=1)])
    path = engine.gallery.index.info["source"]["path"]
    heat = engine.heat(Question("狗"), decode(engine.model, f"{path}/{first[0].key}"))
    x, y, width, height = heat.hottest[0]
    assert x - width / 2 <= bright[0] <= x + 1.5 * width and y - height / 2 <= bright[1] <= y + 1.5 * height
    assert "brightest first" in page.find_element("id", "said").text
    page.find_element("id", "after").click()  # it stays on for the next picture, and for the next visit
    until(page, "return !document.getElementById('heat').hidden")
    toggle.click()
    assert page.execute_script(LAID) is None and toggle.get_attribute("aria-pressed") == "false"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)


def test_a_model_without_patches_has_no_toggle(page, engine, monkeypatch):
    monkeypatch.setattr(type(engine.model.image_tower), "patch_methods", ())
    page.get(page.current_url.split("#")[0] + "?without")
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    page.execute_script("document.querySelector('.zoom').click()")
    until(page, "return document.getElementById('large').open")
    assert not page.find_element("id", "heatOn").is_displayed()
    page.switch_to.active_element.send_keys(Keys.ESCAPE)


def test_nothing_is_wider_than_the_window(page):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    for width in (360, 620, 800, 1600):
        with browsers.width(page, width):
            assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_words_of_a_name_are_never_markup(page, engine, monkeypatch):
    markup = "<img src=x onerror='window.hacked=1'>"
    monkeypatch.setattr(
        engine.gallery.index, "described", lambda number: (markup, {markup: markup, "链接": "javascript:hacked=1"})
    )
    page.find_element("id", "text").send_keys("猫" + Keys.ENTER)
    assert settled(page)[0].startswith("<img")
    page.execute_script("document.querySelector('.zoom').click()")
    until(page, "return document.querySelectorAll('#largeKept dd').length === 2")
    assert page.execute_script("return [window.hacked, document.querySelector('#largeKept a')]") == [None, None]
    page.execute_script("document.getElementById('large').close()")


def test_a_missing_picture_has_a_place(page, engine, monkeypatch):
    monkeypatch.setattr(engine.gallery.index, "described", lambda number: (f"gone-{number}.png", {}))
    monkeypatch.setattr(engine.gallery.index, "item", lambda number: (f"gone-{number}.png", f"gone{number}"))
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


def test_the_path_that_is_copied(page, engine):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    name = settled(page)[0]
    page.execute_script("document.querySelector('.zoom').click()")
    page.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as http gives it
    page.find_element("id", "largeCopy").click()
    path = f"{engine.gallery.index.info['source']['path']}/{name}"
    until(page, f"return document.getElementById('said').textContent === {'Copied: ' + path!r}")
    page.switch_to.active_element.send_keys(Keys.ESCAPE)


def test_the_end_of_a_name_is_seen(page, engine, monkeypatch):
    long = "2024/一个很长的文件夹名字/another folder with a long name/" + "x" * 60 + "/IMG_0042.jpg"
    monkeypatch.setattr(engine.gallery.index, "described", lambda number: (long, {}))
    page.find_element("id", "text").send_keys("猫" + Keys.ENTER)
    settled(page)
    inside = """const box = document.querySelector('.name'), text = box.querySelector('bdi').firstChild, r = document.createRange();
        const at = n => { r.setStart(text, n); r.setEnd(text, n + 1); const c = r.getBoundingClientRect(), b = box.getBoundingClientRect();
                          return c.left >= b.left - 1 && c.right <= b.right + 1; };
        return [at(text.length - 1), at(text.length - 8), at(0)]"""
    assert page.execute_script(inside) == [True, True, False]


def test_words_are_kept_or_set_aside_visibly(page, photos_once, engine):
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    settled(page)
    page.find_element("id", "file").send_keys(str(photos_once / engine.gallery.index.key(6)))
    until(page, "return document.getElementById('note').textContent.includes('together with the words “狗”')")
    settled(page)
    page.find_element("id", "noteDo").click()
    until(page, "return document.getElementById('note').hidden")
    assert (
        settled(page)[0] == engine.gallery.index.key(6) and page.find_element("id", "text").get_property("value") == ""
    )
    page.find_element("id", "text").send_keys("猫" + Keys.ENTER)
    settled(page)
    page.execute_script("document.querySelector('.card').click()")
    until(page, "return document.getElementById('note').textContent.includes('“猫” were set aside')")
    page.find_element("id", "noteDo").click()
    assert page.find_element("id", "text").get_property("value") == "猫"
    settled(page)


def test_an_address_brings_a_picture_back(page, photos_once, engine):
    page.find_element("id", "file").send_keys(str(photos_once / engine.gallery.index.key(6)))
    until(page, "return document.querySelector('.card')")
    names = settled(page)
    until(page, "return location.hash.includes('picture=')")
    kept = "const done = arguments[0]; shelf.get(new URLSearchParams(location.hash.slice(1)).get('picture')).then(f => done(Boolean(f)))"
    assert page.execute_async_script(kept)
    page.refresh()
    until(page, "return document.querySelector('.card')")
    assert settled(page) == names and page.find_element("id", "chip").is_displayed()
    page.find_element("id", "text").send_keys("狗" + Keys.ENTER)
    page.execute_script("share.value = '0.1'; share.dispatchEvent(new Event('input'))")
    until(page, "return location.hash.includes('share=0.1')")
    names = settled(page)
    page.refresh()
    until(page, "return document.querySelector('.card')")
    assert settled(page) == names and page.find_element("id", "share").get_attribute("value") == "0.1"
    page.execute_script("location.hash = '#q=&picture=nowhere'")
    until(page, "return document.getElementById('note').textContent.includes('Choose it again')")
    assert not page.find_element("id", "noteDo").is_displayed()


def test_an_error_is_said_in_the_language_of_the_page(page):
    page.find_element("id", "language").click()
    page.execute_script("location.hash = '#like=999999'")
    until(page, "return !document.getElementById('error').hidden")
    assert page.find_element("id", "error").text == "无法这样搜索。请换个说法，或去掉筛选条件再试。"
    page.find_element("id", "language").click()
    said = page.find_element("id", "error").text  # with what the server says, which speaks English
    assert said.startswith("This cannot be searched. ") and len(said) > 40


def test_a_phone_folds_the_settings(page):
    assert page.execute_script("return document.getElementById('tools').open")
    with browsers.width(page, 390):
        until(page, "return !document.getElementById('tools').open")
        assert not page.find_element("id", "not").is_displayed()
        page.find_element("css selector", "summary").click()
        page.find_element("id", "not").send_keys("red")
        assert page.find_element("id", "set").text == "1 set"
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    until(page, "return document.getElementById('tools').open")


def test_an_address_with_its_password_opens_the_page(chromium, engine):
    with served(engine, password="snow hill") as place:
        chromium.get(place)
        assert not chromium.find_elements("id", "text")
        chromium.get(place.replace("http://", "http://anyone:snow%20hill@"))
        until(chromium, "return document.getElementById('about').textContent !== ''")
        chromium.find_element("id", "text").send_keys("狗" + Keys.ENTER)
        assert len(settled(chromium)) == 20
        until(chromium, "return document.querySelector('.frame img').naturalWidth > 0")
