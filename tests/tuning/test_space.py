"""What a search looks through: a trial of the recipe's own values is the recipe, and axes of one's own are among them or refused."""

from __future__ import annotations

import pytest

from cnclip_ft.recipe_files import checked_recipe
from cnclip_ft.training.context import make_context
from cnclip_ft.training.optimizer import rules_for, training_table
from cnclip_ft.training.stage_plan import plan_stages
from cnclip_ft.tuning.space import axes_of, given_axes
from data_tools.errors import RequestError
from tests.tuning.searches import Fake, recipe, searched, space_of

pytest.importorskip("optuna")


@pytest.mark.parametrize("name", ["align", "contrast"])
def test_a_trial_of_the_own_values_is_the_recipe(stores, name):
    context, model = make_context(recipe(stores, "stages.align.ema=0.9"), write=False)
    plan = next(plan for plan in plan_stages(context, model) if plan.name == name)
    space = axes_of(plan, context.new_parts, 1000, 1, patches=True, captions=5.0)
    content = recipe(stores, "stages.align.ema=0.9").model_dump(mode="json")
    content["stages"] = {name: space.stage(space.own())}
    trial = checked_recipe(content).stages[name]
    same = {"train", "validate_every"}
    assert trial.model_dump(exclude=same) == plan.setting.model_dump(exclude=same)
    ours, theirs = (
        {entry.name: (entry.rate, entry.lora) for entry in table}
        for table in (training_table(model, plan.objective, rules_for(trial, context.new_parts)), plan.entries)
    )
    assert ours == theirs
    assert {"rate", "batch size", "length", "averaged over"} <= {axis.name for axis in space.axes}
    assert ("image rate" in space.own()) == (name == "contrast") and ("crop" in space.own()) == (name == "contrast")
    assert ("captions at once" in space.own()) == (name == "contrast")


def test_values_reach_the_stage(stores):
    stage = space_of(stores).stage(
        {
            "rate": 2.0,
            "batch size": 64,
            "length": 1.5,
            "captions at once": 3,
            "image rate": 0.25,
            "heads rate": 4.0,
            "lora": "8",
            "averaged over": 0.5,
        }
    )
    assert stage["learning_rate"] == 3.4e-3 and stage["batch_size"] == 64 and stage["micro_batch_size"] == 16
    assert stage["steps"] == round(12 * 16 * 1.5 / 64) and stage["warmup_steps"] == round(3 * stage["steps"] / 12)
    assert stage["ema"] == pytest.approx(1 - 1 / (0.5 * stage["steps"]))
    rates = {(rule["tower"], rule["part"]): rule["rate"] for rule in stage["train"]}
    assert (
        rates[("image", "trunk")] == 10 * 0.25 and rates[("text", "trunk")] == 10 and rates[("text", "projection")] == 4
    )
    assert rates[("temperature", "all")] == 40 and stage["captions_at_once"] == 3
    assert {rule["lora"]["rank"] for rule in stage["train"] if rule["part"] == "trunk"} == {8}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("stages.contrast.nothing=1,2", "no such key"),
        ("stages.contrast.objective=1,2", "is a section"),
        ("stages.contrast.learning_rate=1e-2..1e-4", "not below"),
        ("stages.contrast.learning_rate=0..1e-4", "above 0"),
        ("stages.contrast.learning_rate=1e-9..1e-8", "lies outside"),
        ("stages.contrast.ema=0.98", "two values or more"),
    ],
)
def test_an_axis_of_ones_own_that_cannot_be_is_refused(stores, given, says):
    with pytest.raises(RequestError, match=says):
        given_axes(space_of(stores), [given])


def test_axes_of_ones_own(stores):
    space = given_axes(
        space_of(stores),
        [
            "stages.contrast.learning_rate=1e-4..1e-2",
            "stages.contrast.ema=null,0.9",
            "stages.contrast.objective.positives=soft",
        ],
    )
    assert space.own() == {"learning_rate": 1.7e-3, "ema": 0.98, "objective.positives": "exclude"}
    stage = space.stage({"learning_rate": 1e-3, "ema": None, "objective.positives": "soft"})
    assert (stage["learning_rate"], stage["ema"], stage["objective"]["positives"]) == (1e-3, None, "soft")


def test_a_range_of_whole_numbers_is_drawn_in_whole_numbers(stores, tmp_path):
    given = ("stages.align.batch_size=4..32",)
    found, _ = searched(stores, tmp_path / "s", Fake(), trials=6, given=given)
    values = [trial.values["batch_size"] for trial in found.trials["align"]]
    assert all(isinstance(value, int) and 4 <= value <= 32 for value in values) and len(set(values)) > 1
    assert [trial.state for trial in found.trials["align"]] == ["complete"] * 6


@pytest.mark.parametrize(
    "values", ["optimizer.nothing=1,2", "batch_size=16,0", "batch_size=8.5..32", "weight_decay=0.001..wide"]
)
def test_values_that_cannot_be_are_refused_before_the_first_trial(stores, tmp_path, values):
    runs = Fake()
    with pytest.raises(RequestError, match="--search"):
        searched(stores, tmp_path / "s", runs, trials=4, given=(f"stages.align.{values}",))
    assert not runs.runs
    searched(stores, tmp_path / "s", runs, trials=1)  # the folder holds no search that would have to be continued
