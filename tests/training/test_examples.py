"""Example queries of the report: what is kept of a picture found stands below it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cnclip_ft.features.encode import SplitFeatures
from cnclip_ft.training.examples import find_examples
from cnclip_ft.training.report import write_report
from data_tools.store import StoreWriter, open_store
from tests.data_tools.samples import picture

KEPT = {"标题": "连衣裙 <新款>", "价格": 99, "类目": "女装", "链接": "https://shop.example/7?a=1&b='2'"}


def test_kept_columns_stand_below_the_pictures_found(tmp_path):
    with StoreWriter(tmp_path / "s") as writer:
        for n in range(4):
            writer.add_image(n, picture(n), columns=KEPT | {"价格": 99 + n} if n else {})
            writer.add_pair(n, n, f"第 {n} 张图", "zh")
        writer.finish()
    images = F.normalize(torch.eye(4) + 0.1, dim=1)
    features = SplitFeatures(
        image_features=images,
        text_features=images.clone(),
        image_ids=[0, 1, 2, 3],
        text_ids=[0, 1, 2, 3],
        texts=[f"第 {n} 张图" for n in range(4)],
        languages=["zh"] * 4,
        positives=torch.stack([torch.arange(4)] * 2, 1),
    )
    examples = find_examples(features, open_store(tmp_path / "s"), shown=1)
    assert [example.found[0].columns.get("价格") for example in examples] == [None, 100, 101, 102]
    (tmp_path / "journal.jsonl").write_text("")
    page = write_report(
        tmp_path, title="t", plan="", rows=[], notes=[], journal=tmp_path / "journal.jsonl", examples=examples,
        settings="", language="zh",
    ).read_text(encoding="utf-8")  # fmt: skip
    assert page.count("<div class=kept>类目 女装</div>") == 3 and "价格 102" in page
    assert "标题 连衣裙 &lt;新款&gt;" in page and "href='https://shop.example/7?a=1&amp;b=&#x27;2&#x27;'" in page
