"""Pages that are one file (a run's report, the data check), as a browser shows them: for everybody, on a phone, in the dark."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cnclip_ft.training.curves import curves
from cnclip_ft.training.run import train
from data_tools.build import build_store
from data_tools.check.judge import judge
from data_tools.check.measure import measure
from data_tools.check.page import write_page
from data_tools.sources import open_source
from data_tools.store import open_store
from tests import browser as browsers
from tests.commands.test_data import call
from tests.data_tools.samples import picture
from tests.evaluation import tiny
from tests.training.helpers import stopped_after, tiny_recipe, write_stores

JOURNAL = [
    {"kind": "validation", "stage": "start", "step": 0, "mean_recall": 12.5},
    *({"kind": "train", "stage": "align", "step": n, "loss": 3 / n, "accuracy": n / 10, "rate": 1e-4, "logit_scale": 14.3,
       "pairs_per_second": 90.0} for n in (1, 2, 3, 4)),
    {"kind": "validation", "stage": "align", "step": 4, "mean_recall": 20.0},
    {"kind": "train", "stage": "contrast", "step": 1, "loss": 0.5, "accuracy": 0.5, "rate": 1e-5, "logit_scale": 15.0,
     "pairs_per_second": 80.0},
    {"kind": "validation", "stage": "contrast", "step": 2, "mean_recall": 30.0},
]  # fmt: skip


def test_curves_begin_with_the_start():
    drawn = "".join(curves(JOURNAL, "en"))
    assert drawn.count("<svg") == 6 and "<script" not in drawn
    recall = next(part for part in drawn.split("<svg") if "mean recall" in part)
    assert "class=start" in recall and ">start<" in recall and "12.5 → 30" in recall
    assert recall.count("align") == 1 and recall.count("contrast") == 1
    (align,) = [part for part in recall.split("<path ") if "--one" in part]
    assert align.split("d='M")[1].startswith("52.0 ") and "L" in align  # from step 0 on
    assert curves([JOURNAL[0]], "en") == []
    small = [{**JOURNAL[1], "rate": 5.3364e-7, "step": n} for n in (1, 2)]
    labels = [
        label
        for part in curves(small, "en")
        for label in re.findall(r"text-anchor=end dominant-baseline=middle>([^<]+)<", part)
    ]
    assert "5.3e-07" in labels and all(len(label) <= 7 for label in labels)
    nasty = curves([{**JOURNAL[1], "stage": "<b>"}], "zh")
    assert "<b>" not in "".join(nasty)


def test_losses_share_a_panel_and_norms_have_one_each():
    norms = {"gradient_norms": {"image_trunk": 4.0, "text_projection": 0.04, "temperature": 9.0}}
    records = [
        JOURNAL[0] | {"loss": 2.5},
        *(
            record | norms if record["kind"] == "train" else record | {"loss": 2.0, "gap": 0.25}
            for record in JOURNAL[1:]
        ),
    ]
    drawn = "".join(curves(records, "en"))
    assert drawn.count("<svg") == 8  # no update is in this journal
    gap = next(part for part in drawn.split("<svg") if ">gap: validation − training loss<" in part)
    assert "0.25 → 0.25" in gap and "class=start" not in gap
    loss, norm = (
        next(part for part in drawn.split("<svg") if f">{title}<" in part)
        for title in ("loss (dashed: validation)", "gradient norms")
    )
    lines = [part for part in loss.split("<path ") if "stroke: var(" in part]
    assert ["dasharray" in line for line in lines] == [True, True, False, False]  # of two stages each
    first = next(line for line in lines if "dasharray" in line and "--one" in line)
    assert first.split("d='M")[1].startswith("52.0 ")  # from the start on
    assert loss.count(">align<") == loss.count(">contrast<") == 1
    assert "image trunk" in norm and "text projection" in norm and "temperature" not in norm
    heights = re.findall(r"dominant-baseline=middle>([^<]+)<", norm)
    assert heights == ["0.04", "0.4", "4"]  # by tens
    chinese = "".join(curves(records, "zh"))
    assert "虚线：验证" in chinese and "图像主干" in chinese and "image trunk" not in chinese


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(page, language) → (file, words of the user's own in it): of runs that were stopped or brought nothing, of data with faults."""
    folder = tmp_path_factory.mktemp("pages") / "a_path_too_long_for_a_line_of_a_phone"  # pages name it
    folder.mkdir()
    return {**reports(write_stores(folder / "runs")), **checks(folder / "checks"), **curations(folder / "curations")}


def reports(stores):
    own = [pair.text for name in ("train", "valid") for pair in open_store(stores / name)]
    guarded = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0}
    guarded |= {"guard": {"split": str(stores / "valid")}}
    found = {}
    for language, other in (("en", "zh"), ("zh", "en")):
        recipe = tiny_recipe(stores, output=str(stores / language), data=guarded, contrast={"learning_rate": 1e-12})
        assert not train(recipe, language=other, **stopped_after(("align", 4)))
        report = stores / language / "report" / "index.html"
        found["stopped", other] = (report.rename(stores / f"stopped-{other}.html"), own)
        assert train(recipe, proceed=True, language=language)
        found["report", language] = (report, own)
    return found


def checks(folder):
    """Of a store with every finding that a page can have, and of one beside it that shares pictures and captions."""
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number % 3, (1200, 1100) if number == 2 else (64, 48)))
    (folder / "broken.jpg").write_bytes(b"nothing")
    captions = ["一只狗", "一只猫", "很长的文本" * 20, "a red car"]
    rows = [
        "图片,标题",
        *(f"{number}.jpg,{text}" for number, text in enumerate(captions)),
        "broken.jpg,x",
        "gone.jpg,y",
    ]
    (folder / "t.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    stores = [
        build_store(
            open_source("table", str(folder / "t.csv"))[""], folder / name, on_error="skip", progress=False
        ).store
        for name in ("first", "second")
    ]
    found = {}
    for language in ("en", "zh"):
        report = judge([measure(store, lengths=Lengths(), progress=False) for store in stores])
        page = folder / f"{language}.html"
        write_page(report, {store.name: store for store in stores}, page, language=language)
        found["check", language] = (page, captions)
    return found


class Lengths:
    """A token a character."""

    context_length = 52

    def __call__(self, texts):
        return [len(text) for text in texts]


def curations(folder):
    folder.mkdir()
    store, checkpoint = tiny.make_store(folder / "store"), tiny.make_checkpoint(folder / "best")
    own, found = [pair.text for pair in open_store(store)], {}
    for language in ("en", "zh"):
        page = folder / f"{language}.html"
        limits = ["--near", "0.955", "--fit", "0.05", "--most", "1"]
        code, said = call("curate", store, checkpoint, "--report", page, "--language", language, *limits)
        assert code == 0, said
        found["curate", language] = (page, own)
    return found


class Words(HTMLParser):
    """The words of a page, a line an element; styles, and what stands in the settings, left out."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.lines, self.inside = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.inside.append(tag)
        self.lines += [value for name, value in attrs if name in ("aria-label", "title", "alt") and value]

    def handle_data(self, data):
        if self.inside[-1] != "style":
            self.lines += data.split("\n")


@pytest.mark.parametrize("kind", ["report", "stopped", "check", "curate"])
def test_a_page_speaks_one_language(pages, kind):
    """No English sentence in a Chinese page, no Chinese word in an English one, captions and settings apart."""
    said = {}
    for language in ("en", "zh"):
        page, own = pages[kind, language]
        text = "\n".join(Words(page).lines).replace("\nSettings\n", "\n全部设置\n")
        text = text.split("\n全部设置\n")[0]
        for words in sorted(own, key=len, reverse=True):
            text = text.replace(words, "…")
        said[language] = re.sub(r"\S*/\S*", "…", text)  # places
        assert f"<html lang='{'zh-CN' if language == 'zh' else 'en'}'>" in page.read_text(encoding="utf-8")
    assert re.findall(r"[A-Za-z]{2,}(?:[ ,]+[A-Za-z]{2,}){2,}", said["zh"]) == []
    assert re.findall("[\u3000-\u9fff\uff00-\uffef]+", said["en"]) == []
    assert len(re.findall("[\u4e00-\u9fff]", said["zh"])) > 100 and len(said["en"]) > 500


class TestInABrowser:
    pytestmark = browsers.needed

    @pytest.fixture(scope="class")
    def chromium(self):
        with browsers.browser() as driver:
            yield driver

    @pytest.mark.parametrize("language", ["en", "zh"])
    @pytest.mark.parametrize("kind", ["report", "stopped", "check", "curate"])
    def test_everybody_can_read_it(self, chromium, pages, kind, language):
        chromium.get(pages[kind, language][0].as_uri())
        for colours in ("light", "dark"):
            with browsers.theme(chromium, colours):
                assert browsers.axe_findings(chromium) == [], colours
                background = "return getComputedStyle(document.body).backgroundColor"
                assert (chromium.execute_script(background) == "rgb(22, 22, 22)") == (colours == "dark")
        with browsers.width(chromium, 360):
            assert chromium.execute_script("return document.documentElement.scrollWidth") <= 360
            lines = "return [...document.querySelectorAll('td.count, .whole')].map(e => e.firstChild).map(t => { const r = document.createRange(); r.selectNode(t); return r.getClientRects().length })"
            assert set(chromium.execute_script(lines)) <= {1}  # no number and no word of a head is broken
            assert browsers.axe_findings(chromium) == []
