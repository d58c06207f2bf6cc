"""A run on several stores: stopped and continued, on several devices, with cached features, planned and refused."""

from __future__ import annotations

import shutil

import pytest

from cnclip_ft.recipe import dump_recipe
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.training.helpers import losses, planned, stopped_after, tiny_recipe, write_store
from tests.training.test_continuing import same_end
from tests.training.test_processes import MODEL, TRAIN, launch


@pytest.fixture(scope="module")
def two(stores):
    """The store of twenty pictures, and one of twelve others with the same ids."""
    write_store(stores / "other", images=12, captions=1, seed=5)
    return stores


def recipe_of(two, folder, *, weight=2.0, other="other", cached=True, batches="mixed", **changes):
    data = {
        "train": [{"store": str(two / "train")}, {"store": str(two / other), "weight": weight, "language": "zh"}],
        "batches": batches, "valid": str(two / "valid"), "workers": 0,
    }  # fmt: skip
    stage = {"feature_cache": cached}
    return tiny_recipe(
        two, output=str(folder), feature_cache=str(two / "cache"), data=data, align=stage, contrast=stage, **changes
    )


@pytest.mark.parametrize("batches", ["mixed", pytest.param("by_store", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(two, tmp_path, batches):
    assert train(recipe_of(two, tmp_path / "whole", batches=batches))
    recipe = recipe_of(two, tmp_path / "stopped", batches=batches)
    assert not train(recipe, **stopped_after(("align", 4)))
    assert not train(recipe, proceed=True, **stopped_after(("contrast", 4)))
    shutil.copytree(two / "other", tmp_path / "moved")
    moved = [f"data.train.1.store={tmp_path / 'moved'}"]
    assert train(load_recipe(tmp_path / "stopped" / "recipe.yaml", moved), proceed=True)
    assert same_end(tmp_path / "stopped", tmp_path / "whole")


def test_another_weight_or_another_store_is_another_run(two, tmp_path):
    assert not train(recipe_of(two, tmp_path / "run"), **stopped_after(("align", 4)))
    with pytest.raises(RequestError, match=r"data.train.1.weight: 2.0 → 3.0"):
        train(recipe_of(two, tmp_path / "run", weight=3.0), proceed=True)
    with pytest.raises(RequestError, match=r"data.train: .*valid holds other data"):
        train(recipe_of(two, tmp_path / "run", other="valid"), proceed=True)


@pytest.mark.slow
def test_two_devices_train_as_one(two, tmp_path, one_thread):
    files = {}
    for processes in (1, 2):
        recipe = recipe_of(two, tmp_path / f"by-{processes}", model=MODEL)
        files[processes] = tmp_path / f"{processes}.yaml"
        files[processes].write_text(dump_recipe(recipe), encoding="utf-8")
        launch(TRAIN, tmp_path, processes, str(files[processes]), "new", "never", "")
    one, both = (losses(tmp_path / f"by-{processes}") for processes in (1, 2))
    assert one.keys() == both.keys() and all(one[key] == pytest.approx(both[key], abs=1e-5) for key in one)


def test_cached_features_are_those_of_their_store(two, tmp_path):
    train(recipe_of(two, tmp_path / "cached"))
    train(recipe_of(two, tmp_path / "computed", cached=False))
    cached, computed = losses(tmp_path / "cached"), losses(tmp_path / "computed")
    assert all(cached[key] == pytest.approx(computed[key], abs=1e-4) for key in cached)


def test_the_plan_says_what_of_an_epoch_is_whose(two, tmp_path):
    context, model, plans = planned(recipe_of(two, tmp_path / "run", batches="by_store", weight=1.5))
    said = describe(context, model, plans)
    assert "52 pairs, 32 images (2 stores, batches of one each)" in said
    assert f"{two / 'train'}: 40 pairs, weight 1, 71.4% of an epoch" in said
    assert f"{two / 'other'}: 12 pairs, weight 1.5, 28.6% of an epoch" in said
    assert "languages: mixed 26, zh 26" in said and plans[0].order.steps_per_epoch == 7
    assert "do not say their language" not in said
    context.pairs.languages[""] = 3
    assert "do not say their language, data.train.N.language=zh" in describe(context, model, plans)


def test_what_cannot_be_a_mixture_is_refused_in_words(two, tmp_path):
    for train_on, said in (
        ([{"store": str(two / "train")}, {"store": str(two / "nowhere")}], r"data.train.1.store: .*nowhere.*data.train.1.store=PLACE"),
        ([str(two / "train"), str(two / "train") + "/."], r"data.train.1.store: .* stands in the list before.*data.train.N.weight=2"),
    ):  # fmt: skip
        recipe = recipe_of(two, tmp_path / "run")
        data = recipe.data.model_copy(
            update={"train": type(recipe.data).model_validate({"train": train_on, "valid": "v"}).train}
        )
        with pytest.raises(RequestError, match=said):
            planned(recipe.model_copy(update={"data": data}))
