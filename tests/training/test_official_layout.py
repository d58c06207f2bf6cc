"""The official folder as it is, and the page that says where every official flag went."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cnclip_ft.data.official_layout import split_in, weights_beside
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.training.context import open_split
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


def flags_of(file: Path) -> set[str] | None:
    """The flags of a script, None where it is none; read, not run."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    named = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"]
    flags = {
        str(part.value) for node in named for part in node.args if isinstance(part, ast.Constant) and part.value != "-h"
    }
    return flags if flags or "sys.argv" in file.read_text(encoding="utf-8") else None


@requires_official
@pytest.mark.parametrize("page", ["migrate.md", "migrate.zh-CN.md"])
def test_every_official_script_and_flag_has_its_line(page):
    """In the section of its part of the package: every script that takes arguments, and every one of its flags."""
    sections = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## ")
    count = 0
    for part in ("training", "preprocess", "eval", "deploy"):
        (section,) = (text for text in sections if f"`cn_clip/{part}" in text.splitlines()[0])
        said = set(re.findall(r"--?\w[\w-]*|\w+\.py", section))
        for file in sorted((FOLDER / "cn_clip" / part).glob("*.py")):
            flags = flags_of(file)
            if flags is None:
                continue
            count += len(flags)
            script = "main.py" if file.name == "params.py" else file.name
            assert sorted((flags | {script}) - said) == [], file.name
    assert count > 130
