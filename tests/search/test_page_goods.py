"""The page over goods that keep titles, categories, prices and links: filters, all matches, the enlarged view; and axe over all of it.

Skipped where there is no Chromium with its driver, or no selenium.
"""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("uvicorn", reason="not installed: pip install 'cnclip-ft[serve]'")
pytest.importorskip("selenium", reason="not installed: pip install 'cnclip-ft[test]'")

from selenium.webdriver.common.keys import Keys

from cnclip_ft.search.engine.engine import open_engine
from tests import browser as browsers
from tests.browser import until
from tests.search.served import served, settled, shown
from tests.search.test_filters import goods as goods_store

pytestmark = browsers.needed


def test_choosing_by_what_is_kept(chromium, make, checkpoint, tmp_path):
    engine = open_engine(_goods_index(make, checkpoint, tmp_path), device="cpu")
    with served(engine) as address:
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
        assert len(kept) == 8 and all(text.endswith("0 · 女装") for text in kept)
        titles = chromium.execute_script(
            "return [...document.querySelectorAll('.card .title')].map(e => e.textContent)"
        )
        assert titles == [f"一张图 {number}" for number in shown(chromium)]  # no title is kept: the caption is shown
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
    make(checkpoint, goods_store(tmp_path / "goods"), tmp_path / "goods.index")
    return tmp_path / "goods.index"


@pytest.fixture
def goods(chromium, shop):
    """The page over 130 pictures with titles, categories, prices and links."""
    with served(open_engine(shop, device="cpu")) as address:
        chromium.get(address)
        chromium.execute_script("localStorage.setItem('language', 'en')")
        chromium.get("about:blank")
        chromium.get(address)
        until(chromium, "return document.querySelector('#facets select')")
        chromium.get_log("browser")
        yield chromium
        assert not [entry for entry in chromium.get_log("browser") if "Failed to load resource" not in entry["message"]]


def test_more_without_end_and_the_true_number(goods):
    goods.find_element("id", "text").send_keys("裙" + Keys.ENTER)
    first = settled(goods)
    assert len(first) == 24 and "best 24 of 130" in goods.find_element("id", "status").text
    for _ in range(3):
        goods.execute_script("scrollTo({top: document.body.scrollHeight})")
        until(goods, "return document.getElementById('more').hidden || !document.getElementById('more').disabled")
    until(goods, "return document.querySelectorAll('.card').length === 130")
    names = shown(goods)
    assert names[:24] == first and len(set(names)) == 130
    assert not goods.find_element("id", "more").is_displayed()
    assert "best 130 of 130" in goods.find_element("id", "status").text


def test_title_price_link_of_a_picture(goods):
    goods.find_element("id", "text").send_keys("裙" + Keys.ENTER)
    number = int(settled(goods)[0])
    cell = goods.find_element("css selector", ".cell")
    assert cell.find_element("css selector", ".title").text == f"第 {number} 件"
    assert cell.find_element("css selector", ".kept b").text == f"{number}.50"
    links = goods.execute_script("return [...document.querySelectorAll('.link')].map(e => e.href)")
    assert links and all(
        link.startswith("https://shop.example/") for link in links
    )  # no other kind of address is a link


def test_the_enlarged_view_walks_saves_and_copies(goods):
    goods.find_element("id", "text").send_keys("裙" + Keys.ENTER)
    names = settled(goods)
    goods.execute_script("document.querySelectorAll('.zoom')[23].click()")
    name = "return document.getElementById('largeName').textContent"
    assert goods.execute_script(name) == names[23]
    goods.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)  # beyond what was loaded
    until(goods, "return document.querySelectorAll('.card').length === 96")
    until(goods, f"{name} !== {names[23]!r}")
    assert goods.execute_script(name) == shown(goods)[24]
    assert goods.find_element("id", "largePlace").text.startswith("25 of 130")
    goods.find_element("id", "before").click()
    assert goods.execute_script(name) == names[23]
    save = goods.find_element("id", "largeSave")
    assert save.get_attribute(
        "download"
    ) == f"{names[23]}.jpg" and f"images/{names[23]}?size=large" in save.get_attribute("href")
    assert goods.find_element("css selector", "#largeKept dt").text == "标题"
    goods.find_element("id", "largeCopy").click()
    until(goods, f"return document.getElementById('said').textContent === 'Copied: {names[23]}'")
    goods.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(goods, "return !document.getElementById('large').open")


@pytest.mark.parametrize(
    "colours, language",
    [
        ("light", "en"),
        ("dark", "zh"),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("light", "zh"), ("dark", "en"))),
    ],
)
def test_axe_finds_nothing(goods, colours, language):
    if language == "zh":
        goods.find_element("id", "language").click()
    with browsers.theme(goods, colours):
        assert browsers.axe_findings(goods) == []
        goods.find_element("id", "text").send_keys("裙" + Keys.ENTER)
        settled(goods)
        goods.execute_script("const l = document.getElementById('limit'); l.value = 0.2; draw()")  # weak ones too
        assert browsers.axe_findings(goods) == []
        goods.execute_script("localStorage.removeItem('heat'); document.querySelector('.zoom').click()")
        assert browsers.axe_findings(goods) == []
        goods.find_element("id", "heatOn").click()
        until(goods, "return !document.getElementById('heat').hidden")
        assert browsers.axe_findings(goods) == []
        goods.find_element("id", "heatOn").click()
        goods.find_element("id", "largeLike").click()
        until(goods, "return !document.getElementById('note').hidden")
        settled(goods)
        with browsers.width(goods, 390):
            goods.find_element("css selector", "summary").click()
            assert browsers.axe_findings(goods) == []
        goods.execute_script("document.querySelector('.cell').append(document.createElement('img'))")
        assert any("image-alt" in found for found in browsers.axe_findings(goods))  # it would find something
