"""Pages that are one file (a run's report, the data check), as a browser shows them: for everybody, on a phone, in the dark."""

from __future__ import annotations

import json

import pytest

from cnclip_ft.training.curves import curves
from cnclip_ft.training.report import write_report
from data_tools.check.judge import judge
from data_tools.check.measure import measure
from data_tools.check.page import write_page
from data_tools.store import open_store
from tests import browser as browsers
from tests.evaluation import tiny

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
    drawn = "".join(curves(JOURNAL))
    assert drawn.count("<svg") == 6 and "<script" not in drawn
    recall = next(part for part in drawn.split("<svg") if "mean recall" in part)
    assert "class=start" in recall and "start · 起点" in recall and "12.5 → 30" in recall
    assert recall.count("align") == 1 and recall.count("contrast") == 1
    (align,) = [part for part in recall.split("<path ") if "--one" in part]
    assert align.split("d='M")[1].startswith("52.0 ") and "L" in align  # from step 0 on
    assert curves([JOURNAL[0]]) == []
    nasty = curves([{**JOURNAL[1], "stage": "<b>"}])
    assert "<b>" not in "".join(nasty)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "journal.jsonl").write_text("\n".join(map(json.dumps, JOURNAL)) + "\n{cut", encoding="utf-8")
    row = {
        "t2i_r1": 10.0,
        "t2i_r5": 20.0,
        "t2i_r10": 30.0,
        "i2t_r1": 10.0,
        "i2t_r5": 20.0,
        "i2t_r10": 30.0,
        "mean_recall": 20.0,
    }
    report = write_report(
        folder,
        title="cnclip-ft: shop",
        plan="x" * 200,
        rows=[("start", row), ("after align", row)],
        notes=["Stopped."],
        journal=folder / "journal.jsonl",
        examples=[],
        settings="seed: 0\n",
    )
    store = open_store(tiny.make_store(folder / "valid"))
    found = {"report": report}
    for language in ("en", "zh"):
        found[language] = folder / f"{language}.html"
        write_page(judge([measure(store)]), {store.name: store}, found[language], language=language)
    return found


class TestInABrowser:
    pytestmark = browsers.needed

    @pytest.fixture(scope="class")
    def chromium(self):
        with browsers.browser() as driver:
            yield driver

    @pytest.mark.parametrize("page", ["report", "en", "zh"])
    def test_everybody_can_read_it(self, chromium, pages, page):
        chromium.get(pages[page].as_uri())
        for colours in ("light", "dark"):
            with browsers.theme(chromium, colours):
                assert browsers.axe_findings(chromium) == [], colours
                background = "return getComputedStyle(document.body).backgroundColor"
                assert (chromium.execute_script(background) == "rgb(22, 22, 22)") == (colours == "dark")
        with browsers.width(chromium, 360):
            assert chromium.execute_script("return document.documentElement.scrollWidth") <= 360
            assert browsers.axe_findings(chromium) == []
