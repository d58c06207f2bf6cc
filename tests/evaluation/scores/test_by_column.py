"""Recall for every value of a column that a store keeps."""

from __future__ import annotations

import pytest

from cnclip_ft.evaluation.options import Options
from cnclip_ft.evaluation.scores.scorecard import score_checkpoint
from data_tools.errors import RequestError
from data_tools.store import StoreWriter
from tests.evaluation import tiny


def test_every_value_is_scored_among_all_pictures(tmp_path) -> None:
    checkpoint = tiny.make_checkpoint(tmp_path / "best")
    with StoreWriter(tmp_path / "s") as writer:
        for n in range(12):
            writer.add_image(n, tiny.png(n), columns={"类目": "女装" if n < 8 else "男装", "编号": n} if n else {})
            writer.add_pair(n, n, f"第 {n} 张", "zh")
        writer.finish()
    card = score_checkpoint(checkpoint, [tmp_path / "s"], Options(device="cpu", workers=0), "类目")
    (scores,) = card.scores.values()
    whole, parts = scores.text_to_image, scores.by_group
    assert whole is not None and {name: part.text_to_image.queries for name, part in parts.items()} == {
        "女装": 7,
        "男装": 4,
        "–": 1,
    }
    assert all(part.text_to_image.gallery == 12 for part in parts.values())
    hits = sum(part.text_to_image.recall[5] * part.text_to_image.queries for part in parts.values())
    assert hits / 12 == pytest.approx(whole.recall[5])
    assert "s · 女装" in card.table() and "by_group" in card.as_dict()["splits"]["s"]
    with pytest.raises(RequestError, match="did you mean '类目'"):
        score_checkpoint(checkpoint, [tmp_path / "s"], Options(device="cpu", workers=0), "类目名")
