"""Runs that draw one caption a picture: planned, stopped and continued, on two devices as on one; what is refused."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from cnclip_ft.recipe import dump_recipe
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import StoreWriter
from tests.training.helpers import losses, planned, stopped_after, tiny_recipe, write_store
from tests.training.test_continuing import same_end
from tests.training.test_processes import MODEL, TRAIN, launch


def write_weighted(folder, first=2.0):
    """Sixteen pictures, three captions each, of different weights."""
    with StoreWriter(folder) as writer:
        for number in range(16):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * number, 200 - 10 * number, 60)).save(file, "PNG")
            writer.add_image(number, file.getvalue())
        for number in range(48):
            weight = (first, 1.0, 0.5)[number % 3]
            writer.add_pair(number // 3, number, f"第 {number} 张图", "zh", beside={"weight": weight})
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "valid", images=10, captions=2, seed=1)
    write_weighted(folder / "train")
    return folder


def recipe_of(folder, output, captions="weighted", **changes):
    data = {
        "train": str(folder / "train"), "valid": str(folder / "valid"), "workers": 0, "captions": captions,
        **changes.pop("data", {}),
    }  # fmt: skip
    return tiny_recipe(folder, output=str(output), data=data, **changes)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(weights, tmp_path):
    assert train(recipe_of(weights, tmp_path / "whole"))
    recipe = recipe_of(weights, tmp_path / "stopped")
    assert not train(recipe, **stopped_after(("align", 4)))
    assert not train(recipe, proceed=True, **stopped_after(("contrast", 3)))
    assert train(recipe, proceed=True)
    assert same_end(tmp_path / "stopped", tmp_path / "whole")


def test_other_captions_are_another_run(weights, tmp_path):
    assert not train(recipe_of(weights, tmp_path / "run"), **stopped_after(("align", 4)))
    with pytest.raises(RequestError, match="data.captions: 'weighted' → 'one'"):
        train(recipe_of(weights, tmp_path / "run", "one"), proceed=True)
    write_weighted(weights / "other", first=3.0)
    with pytest.raises(RequestError, match="data.train: .*other holds other data"):
        train(recipe_of(weights, tmp_path / "run", data={"train": str(weights / "other")}), proceed=True)


@pytest.mark.slow
def test_two_devices_train_as_one(weights, tmp_path, one_thread):
    for processes in (1, 2):
        file = tmp_path / f"{processes}.yaml"
        file.write_text(dump_recipe(recipe_of(weights, tmp_path / f"by-{processes}", model=MODEL)), encoding="utf-8")
        launch(TRAIN, tmp_path, processes, str(file), "new", "never", "")
    one, both = (losses(tmp_path / f"by-{processes}") for processes in (1, 2))
    assert one.keys() == both.keys() and all(one[key] == pytest.approx(both[key], abs=1e-5) for key in one)


def test_the_plan_says_what_an_epoch_is(weights, tmp_path):
    context, model, plans = planned(recipe_of(weights, tmp_path / "run"))
    said = describe(context, model, plans)
    assert "48 pairs, 16 images" in said and "6 steps = 3.0 epochs of 2" in said
    assert "each with one of its captions (3.0 on average), drawn anew, by weights of 0.5 to 2" in said
    said = describe(*planned(recipe_of(weights, tmp_path / "run", "one")))
    assert "drawn anew, each as likely" in said
    spoken = recipe_of(weights, tmp_path / "run", "one", data={"caption_languages": {"zh": 2}})
    assert "by language (zh 2)" in describe(*planned(spoken))
    both = describe(*planned(recipe_of(weights, tmp_path / "run", data={"caption_languages": {"zh": 2}})))
    assert "drawn anew, by weights times those of languages (zh 2), 1 to 4\n" in both
    assert "one of its captions" not in describe(*planned(recipe_of(weights, tmp_path / "run", "all")))


@pytest.mark.parametrize(
    "data, said",
    [
        ({"captions": "some"}, "data.captions"),
        ({"captions": "one", "caption_languages": {"zh": 0}}, "(?s)data.caption_languages.*above 0: "),
        ({"captions": "one", "caption_languages": {"zh": -1}}, "(?s)data.caption_languages.*above 0: "),
        ({"captions": "one", "caption_languages": {"zh": "often"}}, "caption_languages"),
        ({"captions": "one", "caption_languages": {"fr": 1}}, "caption_languages"),
        ({"captions": "all", "caption_languages": {"zh": 2}}, "every pair is visited"),
    ],
)
def test_what_cannot_be_is_refused_in_the_recipe(weights, tmp_path, data, said):
    with pytest.raises(ValueError, match=said):
        recipe_of(weights, tmp_path / "run", data=data)


def test_a_store_without_weights_is_refused_where_they_are_asked_for(weights, tmp_path):
    with pytest.raises(RequestError, match="data.captions=weighted: no pair of .*valid keeps a weight"):
        planned(recipe_of(weights, tmp_path / "run", data={"train": str(weights / "valid")}))
