"""Published rows stand beside their own split, pool and language alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnclip_ft.evaluation.options import Options
from cnclip_ft.evaluation.results.published import pool_warning, recognise, rows_for
from cnclip_ft.evaluation.scores.scorecard import _add, _card
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.retrieval.recall import recall
from tests.evaluation.tiny import random_split


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


@pytest.mark.parametrize(
    "folder,texts,images,shown",
    [
        ("Flickr30k-CN", "一只狗 {}", 1000, True),
        ("flickr30k", "一只狗 {}", 1000, True),
        ("flickr30k", "dog number {}", 1000, False),
        ("Flickr30k-CN", "dog number {}", 1000, False),
        ("Flickr30k-CN", "一只狗 {}", 900, False),
    ],
)
def test_rows_stand_beside_their_own_pool_and_language_alone(folder, texts, images, shown):
    features = random_split(images, 5000, dim=4)
    features.texts = [texts.format(number) for number in range(5000)]
    place, scores = Path("/data") / folder / "lmdb/test", recall(features)
    for dataset in (None, "flickr30k-cn", "none"):
        card = _card({})
        _add(card, "test", features, scores, {}, "ViT-B-16", place, Options(dataset=dataset))
        wanted = {None: shown, "flickr30k-cn": True, "none": False}[dataset]
        assert [row.model for row in card.published] == ["Chinese-CLIP"] * 2 * wanted
        said = "the published numbers are for" in " ".join(card.notes)
        assert said == (not shown and dataset != "none") and (dataset != "none") == (
            "published" in card.record["splits"]["test"]
        )


def test_another_split_than_the_papers_is_said():
    assert pool_warning("coco-cn", 1000, 1053, "zh") is None and pool_warning("muge", 29806, 5008, None) is None
    assert "900 images instead of 1,000 and 1,000 texts instead of 1,053" in pool_warning("coco-cn", 900, 1000, "zh")
    assert "most of these are English" in pool_warning("flickr30k-cn", 1000, 5000, "en")
