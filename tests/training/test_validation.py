"""What is judged: on several devices as on one, zero-shot lists beside recall, features of a frozen trunk kept."""

from __future__ import annotations

import io
import json
import pickle
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.evaluation.kinds.recall import Recall
from cnclip_ft.evaluation.kinds.zero_shot import ZeroShot, ZeroShotAccuracy
from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.recipe import Recipe
from cnclip_ft.training.run import train
from cnclip_ft.training.validation import Judge
from data_tools.errors import DataFault, RequestError
from data_tools.store import StoreWriter, open_store
from tests.training.helpers import records, tiny_model, tiny_recipe
from tests.training.test_processes import launch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store of 150 pictures with texts that read the same, a lone text and two languages; pictures of three classes."""
    folder = tmp_path_factory.mktemp("judged")
    random = np.random.default_rng(0)

    def picture() -> bytes:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    with StoreWriter(folder / "valid") as writer:
        for number in range(150):
            writer.add_image(number, picture())
        for number in range(300):
            text = f"一只猫 {number}" + "很长" * (number % 9) if number % 50 else "一样的话"
            writer.add_pair(number % 150, number, text, "zh" if number % 2 else "mixed")
        writer.add_lone_text(1000, "没有图片的话", "zh")
        writer.finish()
    for name in ("猫", "狗", "birds"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(3):
            (folder / "classes" / name / f"{number}.png").write_bytes(picture())
    (folder / "classes" / "no label.png").write_bytes(picture())
    (folder / "classes.txt").write_text("猫\n狗\nbirds\t鸟|小鸟\n", encoding="utf-8")
    return folder


def judge_of(place, **options) -> Judge:
    store = open_store(place / "valid")
    listed = ZeroShot(zero_shot=str(place / "classes"), classes=str(place / "classes.txt"))
    evaluators = {"mine": Recall(store), "animals": ZeroShotAccuracy("animals", listed)}
    return Judge(evaluators, torch.device("cpu"), 0, nullcontext, guard=Recall(store), **options)


JUDGE = """
import pickle, sys
from pathlib import Path
import torch, torch.distributed as dist
from tests.training.helpers import tiny_model
from tests.training.test_validation import judge_of

dist.init_process_group("gloo")
rank, place, found = dist.get_rank(), Path(sys.argv[1]), {}
judge, model = judge_of(place), tiny_model()
found["plain"] = judge(model)
judge.trunk_is_frozen = True
found["kept"], found["again"] = judge(model), judge(model)
judge.trunk_is_frozen = False
for name, device in (("picture", 1), ("ranking", 0)):
    recall = judge.evaluators["mine"]
    if rank == device:
        if name == "picture":
            read = recall.store.image
            recall.store.image = lambda image_id: b"no picture" if image_id == 140 else read(image_id)
        else:
            recall.judge = lambda name, encoder: 1 / 0
    try:
        judge(model)
    except Exception as error:
        found[name] = (type(error).__name__, str(error))
    judge = judge_of(place)
gathered = [None] * dist.get_world_size()
dist.all_gather_object(gathered, found)
if rank == 0:
    Path(sys.argv[2]).write_bytes(pickle.dumps(gathered))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_devices_judge_as_one(place, tmp_path, one_thread):
    """Three, of which one has no picture to encode; an error on one reaches all and hangs none."""
    expected = judge_of(place)(tiny_model())
    launch(JUDGE, tmp_path, 3, str(place), str(tmp_path / "found"))
    gathered = pickle.loads((tmp_path / "found").read_bytes())
    for found in gathered:
        for name in ("plain", "kept", "again"):
            assert found[name] == expected
            assert torch.equal(found[name].features.image_features, expected.features.image_features)
            assert torch.equal(found[name].features.text_features, expected.features.text_features)
        assert "image 140" in found["picture"][1]
    assert [found["picture"][0] for found in gathered] == ["FailedElsewhere", "DataFault", "FailedElsewhere"]
    assert [found["ranking"][0] for found in gathered] == ["ZeroDivisionError", "FailedElsewhere", "FailedElsewhere"]
    assert set(expected.scores["mine"].by_language) == {"zh", "mixed"}
    assert expected.scores["animals"].images == 9 and 0 <= expected.scores["animals"].accuracy <= 100


def test_pictures_of_a_frozen_trunk_are_decoded_once(place, monkeypatch):
    model, judge = tiny_model(), judge_of(place)
    plain = judge(model)
    judge.trunk_is_frozen = True
    assert judge(model) == plain
    read, asked = judge.evaluators["mine"].store.image, []
    monkeypatch.setattr(judge.evaluators["mine"].store, "image", lambda i: asked.append(i) or read(i))
    with torch.no_grad():
        model.image_tower.visual_projection.weight.add_(0.1)
        for parameter in model.text_tower.parameters():
            parameter.mul_(1.1)
    kept = judge(model)
    assert not asked
    judge.trunk_is_frozen = False
    assert judge(model) == kept and len(asked) == 300  # as the guard too
    judge.trunk_is_frozen = True
    judge(model)
    with torch.no_grad():  # another trunk is never taken for the one of before
        next(model.image_tower.vision_model.parameters()).add_(0.1)
    other = judge(model)
    judge.trunk_is_frozen = False
    plain = judge(model)
    assert other == plain
    assert torch.equal(other.features.image_features, plain.features.image_features)


def test_a_damaged_picture_is_named_where_the_trunk_is_frozen(place, monkeypatch):
    judge = judge_of(place)
    judge.trunk_is_frozen = True
    monkeypatch.setattr(judge.evaluators["mine"].store, "image", lambda image_id: b"no picture")
    with pytest.raises(DataFault, match="image 0: "):
        judge(tiny_model())


def test_a_zero_shot_list_decides_in_a_run(stores, place, capsys):
    listed = {"zero_shot": str(place / "classes"), "classes": str(place / "classes.txt"), "templates": "none"}
    data = {
        "train": str(stores / "train"),
        "valid": {"mine": str(stores / "valid"), "animals": listed},
        "workers": 0,
    }
    recipe = tiny_recipe(
        stores,
        output=str(stores / "zero-shot"),
        feature_cache=str(stores / "cache"),
        data=data,
        best_by="animals: accuracy",
    )
    assert train(recipe)
    folder, said = stores / "zero-shot", capsys.readouterr().out
    assert "animals: zero-shot, 9 images of 3 classes" in said and "animals accuracy" in said
    judged = [r for r in records(folder, "validation") if r["stage"] == "contrast"]
    best = max(judged, key=lambda r: (r["scores"]["animals"]["accuracy"], -r["step"]))
    info = read_info(folder / "contrast" / "best")
    assert info["score"] == best["scores"]["animals"]["accuracy"] == info["row"]["animals: accuracy"]
    rows = json.loads((folder / "report" / "recall.json").read_text(encoding="utf-8"))
    assert rows["chance"]["animals: accuracy"] == pytest.approx(100 / 3)
    assert rows["after contrast"]["animals: accuracy"] == info["score"]
    assert "animals accuracy" in (folder / "report" / "recall.txt").read_text(encoding="utf-8")
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "animals accuracy" in re.sub(r"</?span[^>]*>", "", page)


def test_what_a_zero_shot_list_holds_is_told_from_other_content(place, tmp_path):
    def checksum(**changes) -> str:
        listed = {"zero_shot": str(place / "classes"), "classes": str(place / "classes.txt")} | changes
        return ZeroShotAccuracy("animals", ZeroShot(**listed)).checksum()

    moved = tmp_path / "moved.txt"
    moved.write_bytes((place / "classes.txt").read_bytes())
    assert checksum() == checksum(classes=str(moved)) != checksum(templates="none")
    moved.write_text("猫\n狗|小狗\nbirds\t鸟|小鸟\n", encoding="utf-8")
    assert checksum() != checksum(classes=str(moved))


@pytest.mark.parametrize(
    "valid,best_by,says",
    [
        ({"a": {"zero_shot": "p", "classes": "c"}}, "mean_recall", "first validation split is a store"),
        ({"s": "v", "a": {"zero_shot": "p"}}, "mean_recall", "data.valid.a.classes: missing"),
        (
            {"s": "v", "a": {"zero_shot": "p", "classes": "c", "names": 1}},
            "mean_recall",
            "a.names: unknown key; known here: store, language, zero_shot, ",
        ),
        ({"s": "v", "a": {"zero_shot": "p", "classes": "c"}}, "a: mean_recall", "scores there are accuracy"),
        ({"s": "v", "a": {"zero_shot": "p", "classes": "c"}}, "accuracy", "scores there are mean_recall"),
    ],
)
def test_recipes_that_cannot_be_judged_by_are_refused(stores, tmp_path, valid, best_by, says):
    import yaml

    from cnclip_ft.recipe_files import load_recipe

    content = tiny_recipe(stores).model_dump(mode="json") | {"best_by": best_by}
    content["data"]["valid"] = valid
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with pytest.raises(RequestError, match=says):
        load_recipe(tmp_path / "recipe.yaml")


def test_places_of_a_zero_shot_list_are_checked_before_training(place, tmp_path):
    listed = {"zero_shot": str(place / "classes"), "classes": str(place / "classes.txt")}
    for key, value in (("zero_shot", "nowhere"), ("classes", "nowhere"), ("templates", "nowhere")):
        with pytest.raises(RequestError, match=rf"data\.valid\.animals\.{key}.*nowhere"):
            ZeroShotAccuracy("animals", ZeroShot(**listed | {key: value}))
    (tmp_path / "classes.txt").write_text("猫\n狗\n", encoding="utf-8")
    with pytest.raises(RequestError, match="folder 'birds' is no class of the list"):
        ZeroShotAccuracy("animals", ZeroShot(**listed | {"classes": str(tmp_path / "classes.txt")}))


def test_recipes_of_before_stay_as_they_are(stores):
    named = tiny_recipe(stores).model_dump(mode="json")
    assert named["data"]["valid"] == str(stores / "valid")
    named["data"]["valid"] = {"a": str(stores / "valid")}
    assert Recipe.model_validate(named).model_dump(mode="json")["data"]["valid"] == {"a": str(stores / "valid")}
