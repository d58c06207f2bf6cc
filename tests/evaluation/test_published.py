from __future__ import annotations

from pathlib import Path

import pytest

from cnclip_ft.evaluation.published import recognise, rows_for, size_warning
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES


@pytest.mark.parametrize(
    "path, found",
    [
        ("data/Flickr30k-CN/lmdb/test", "flickr30k-cn"),
        ("data/MUGE/valid", "muge"),
        ("coco_cn/test", "coco-cn"),
        ("data/Flickr30k-CN/valid", None),
        ("data/MUGE/test", None),
        ("data/flickr8k-cn/test", None),
        ("test", None),
    ],
)
def test_splits_are_recognised_by_their_path(path, found):
    assert recognise(Path("/somewhere") / path) == found


def test_rows_stand_where_the_paper_has_them():
    zero, tuned = rows_for("flickr30k-cn", "ViT-B-16")
    assert zero.setting == "zero-shot" and zero.text_to_image == (62.7, 86.9, 92.8) and zero.image_to_text[0] == 74.6
    assert tuned.image_to_text == (93.5, 99.0, 99.5)
    muge = rows_for("muge", "ViT-H-14")
    assert [row.image_to_text for row in muge] == [None, None]
    assert round(muge[0].mean_recall, 1) == 78.8 and round(muge[1].mean_recall, 1) == 83.6  # means the paper prints
    assert rows_for("coco-cn", "RN50")[1].text_to_image == (66.8, 91.1, 97.0)
    assert rows_for("muge", "tiny") == []


@pytest.mark.parametrize("dataset", ["muge", "flickr30k-cn", "coco-cn"])
def test_every_published_size_is_one_of_the_catalogue(dataset):
    for size in ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"):
        assert size in ARCHITECTURES
        for row in rows_for(dataset, size):
            recalls = [row.text_to_image, *([row.image_to_text] if row.image_to_text else [])]
            assert all(r1 < r5 < r10 for r1, r5, r10 in recalls) and len(row.cells()) == 10


def test_another_split_than_the_papers_is_said():
    assert size_warning("coco-cn", 1000, 1053) is None
    assert "900 images instead of 1,000 and 1,000 texts instead of 1,053" in size_warning("coco-cn", 900, 1000)
    assert size_warning("muge", 3, 3) is None
