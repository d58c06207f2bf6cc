"""The official folder as it is, and the page that says where every official flag went."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cnclip_ft.recipe import Augmentation
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.context import open_split
from cnclip_ft.training.official_layout import split_in, weights_beside
from data_tools.errors import RequestError
from tests.data_tools.samples import write_official
from tests.official import FOLDER, requires_official

ROOT = Path(__file__).resolve().parents[2]


def test_splits_and_weights_are_found_where_the_official_scripts_have_them(tmp_path):
    from data_tools.build import build_split

    place = tmp_path / "datasets/MUGE"
    write_official(place, "train")
    write_official(place, "valid", images=3, start=100)
    for split in ("train", "valid"):
        build_split(place, split, place / "lmdb" / split, layout="official")
    assert [open_split(str(place), key).image_count for key in ("data.train", "data.valid")] == [12, 3]
    assert split_in(str(place / "lmdb/train"), "train") == place / "lmdb/train"
    assert split_in(str(tmp_path), "train") == tmp_path
    build_split(place, "train", tmp_path / "sharded/train", shard_size=5)
    assert open_split(str(tmp_path / "sharded"), "data.train").image_count == 12
    with pytest.raises(RequestError, match=r"data.train: .*datasets"):
        open_split(str(place.parent), "data.train")

    (tmp_path / "pretrained_weights").mkdir()
    file = tmp_path / "pretrained_weights/clip_cn_vit-b-16.pt"
    assert weights_beside("ViT-B-16", [str(place)]) == "ViT-B-16"
    file.write_bytes(b"")
    assert (
        weights_beside("ViT-B-16", [str(place)])
        == weights_beside("ViT-B-16", ["elsewhere", str(place / "lmdb/train")])
        == str(file)
    )
    assert weights_beside("ViT-L-14", [str(place)]) == "ViT-L-14" and weights_beside({"image": "x"}, [str(place)]) == {
        "image": "x"
    }


@pytest.mark.parametrize(
    "name,batch,rate", [("muge", 1024, 5e-5), ("flickr30k-cn", 1024, 5e-5), ("coco-cn", 8192, 3e-5)]
)
def test_recipes_with_the_official_settings(name, batch, rate):
    stage = load_recipe(f"{name}_vit-b-16_8-gpus").stages["contrast"]
    assert (stage.batch_size, stage.learning_rate, stage.betas, stage.eps) == (batch, rate, (0.9, 0.98), 1e-6)
    assert stage.augment == Augmentation(crop=0.9, mirror=True, auto_augment="original") and stage.keep_every == 1


@requires_official
@pytest.mark.parametrize("page", ["migrate.md", "migrate.zh-CN.md"])
def test_every_official_flag_and_script_has_its_line(page):
    said = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for file in (
        "training/params.py",
        "eval/extract_features.py",
        "eval/make_topk_predictions.py",
        "preprocess/build_lmdb_dataset.py",
    ):
        flags = re.findall(r"""["'](--[\w-]+)["']""", (FOLDER / "cn_clip" / file).read_text(encoding="utf-8"))
        assert len(flags) > 2
        if file != "eval/make_topk_predictions.py":  # its features are arguments here
            assert [flag for flag in flags if flag not in said] == [], file
    scripts = [
        path.name for folder in ("eval", "preprocess", "deploy") for path in (FOLDER / "cn_clip" / folder).glob("*.py")
    ]
    helpers = {"__init__.py", "data.py", "benchmark_utils.py", "tensorrt_utils.py"}
    wanted = [n for n in scripts if n not in helpers and not n.endswith(("_templates.py", "_tr.py", "_tensorrt.py"))]
    assert [name for name in wanted if name not in said] == []
