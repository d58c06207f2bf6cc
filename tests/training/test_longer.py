"""A run that is stopped in a validation goes on with it; a finished run is trained further; checkpoints of epochs stay."""

from __future__ import annotations

import shutil

import pytest
import yaml

import cnclip_ft
from cnclip_ft.features.frozen_trunk import FeatureCache
from cnclip_ft.training.run import train
from cnclip_ft.training.run_state import load_state
from cnclip_ft.training.stop import StopRequest
from cnclip_ft.training.validation import Judge
from data_tools.errors import RequestError
from tests.training.helpers import losses, records, tiny_recipe


def recipe_of(stores, name, steps=4, **changes):
    contrast = {"steps": steps, "schedule": "constant", "warmup_steps": 1, "validate_every": 2} | changes
    align = {"steps": 2, "warmup_steps": 1, "validate_every": 2}
    return tiny_recipe(
        stores, output=str(stores / name), feature_cache=str(stores / "cache"), align=align, contrast=contrast
    )


@pytest.fixture(scope="module")
def finished(stores):
    assert train(recipe_of(stores, "plain"))
    return stores / "plain"


@pytest.mark.parametrize("judgement", [0, 1, 3])
def test_a_stop_in_a_validation_is_obeyed_at_once_and_made_up_for(stores, finished, monkeypatch, capsys, judgement):
    """Judgements: start, two of them in align, …"""
    recipe, stop, calls = recipe_of(stores, f"asked-{judgement}"), StopRequest(), []
    judge = Judge._judge

    def asked(self, model):
        calls.append(model)
        if len(calls) == judgement + 1:
            stop.ask()
        return judge(self, model)

    monkeypatch.setattr(Judge, "_judge", asked)
    assert train(recipe, stop=stop) is False and len(calls) == judgement + 1
    said = capsys.readouterr().out
    monkeypatch.setattr(Judge, "_judge", judge)
    if judgement:
        assert "Stopped. Continue with" in said
        assert load_state(stores / f"asked-{judgement}/state", print)["unjudged"]
        assert train(recipe, proceed=True)
    else:  # nothing was trained
        assert "had not begun to train" in said and train(recipe)
    here = stores / f"asked-{judgement}"
    assert losses(here) == losses(finished)
    found, expected = (
        [(r["stage"], r["step"], r["mean_recall"]) for r in records(each, "validation")] for each in (here, finished)
    )
    assert found == expected


def test_a_stop_while_frozen_features_are_computed(stores, monkeypatch):
    recipe, stop = (
        recipe_of(stores, "caching").model_copy(update={"feature_cache": str(stores / "another")}),
        StopRequest(),
    )
    compute = FeatureCache._compute
    monkeypatch.setattr(FeatureCache, "_compute", lambda *given: (stop.ask(), compute(*given))[1])
    assert train(recipe, stop=stop) is False
    monkeypatch.setattr(FeatureCache, "_compute", lambda *_: pytest.fail("it was computed already"))
    assert train(recipe)


def test_a_finished_run_trained_further_equals_a_longer_one(stores, finished, capsys):
    shutil.copytree(finished, stores / "extended")
    assert len(list((finished / "state").iterdir())) == 1
    with pytest.raises(RequestError, match="align.steps: 2 → 9"):
        longer = recipe_of(stores, "extended", 8)
        stages = longer.stages | {"align": longer.stages["align"].model_copy(update={"steps": 9})}
        train(longer.model_copy(update={"stages": stages}), proceed=True)
    with pytest.raises(RequestError, match="contrast.steps: 4 → 3"):
        train(recipe_of(stores, "extended", 3), proceed=True)
    assert (stores / "extended/report/recall.json").is_file()
    capsys.readouterr()
    assert train(recipe_of(stores, "extended", 8), proceed=True)
    assert (
        "goes on from step 4 to 8; it was to end at 4. Its rate follows the constant curve" in capsys.readouterr().out
    )
    assert train(recipe_of(stores, "at-once", 8))
    assert losses(stores / "extended") == losses(stores / "at-once")
    assert yaml.safe_load((stores / "extended/recipe.yaml").read_text("utf-8"))["stages"]["contrast"]["steps"] == 8
    shutil.rmtree(stores / "extended/state")
    with pytest.raises(RequestError, match="its state is gone. Train its weights further with model.start="):
        train(recipe_of(stores, "extended", 16), proceed=True)


def test_a_stage_that_a_plateau_ended_goes_on_when_it_is_given_more(stores):
    settings = {"until": "plateau", "min_gain": 100.0, "patience": 1, "validate_every": 1}
    assert train(recipe_of(stores, "flat", 3, **settings))
    assert max(step for stage, step in losses(stores / "flat") if stage == "contrast") == 1
    assert train(recipe_of(stores, "flat", 5, **settings), proceed=True)
    assert max(step for stage, step in losses(stores / "flat") if stage == "contrast") == 2


def test_checkpoints_of_epochs_stay(stores):
    recipe = recipe_of(stores, "epochs", keep_every=1, batch_size=20)  # two steps an epoch
    assert train(recipe)
    kept = sorted(path.name for path in (stores / "epochs/contrast").iterdir())
    assert kept == ["best", "epoch-1", "epoch-2", "last"]
    last, second = (cnclip_ft.load(stores / "epochs/contrast" / name).state_dict() for name in ("last", "epoch-2"))
    assert all((last[name] == second[name]).all() for name in last)
    assert train(recipe_of(stores, "epochs", batch_size=20), overwrite=True)
    assert sorted(path.name for path in (stores / "epochs/contrast").iterdir()) == ["best", "last"]
