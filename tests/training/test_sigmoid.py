"""Runs with a sigmoid loss: the bias belongs to the model, through stages, states and averages."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from cnclip_ft.recipe import Stage
from cnclip_ft.training.run import train
from cnclip_ft.training.run_state import save_state
from cnclip_ft.training.stage_plan import make_objective
from data_tools.errors import RequestError
from tests.training.helpers import losses, records, stopped_after, tiny_recipe

SIGMOID = {"objective": {"kind": "sigmoid"}}


def numbers(folder):
    return {n: t.item() for n, t in load_file(folder / "model.safetensors").items() if n.startswith("logit_")}


def test_a_sigmoid_loss_gives_the_model_its_bias_once(stores):
    """The next sigmoid stage goes on with bias and temperature, a softmax one leaves the bias as it is."""
    steps = {"steps": 2, "learning_rate": 1e-2, "validate_every": 2, "ema": None}
    recipe = tiny_recipe(stores, output=str(stores / "sigmoid"), align=steps | SIGMOID, contrast=steps | SIGMOID)
    stage = recipe.stages["contrast"]
    softmax = stage.model_copy(
        update={"objective": recipe.stages["align"].objective.model_copy(update={"kind": "contrastive"})}
    )
    recipe = recipe.model_copy(update={"stages": {**recipe.stages, "softmax": softmax}})
    assert train(recipe)
    align, again, last = (numbers(stores / "sigmoid" / name / "last") for name in ("align", "contrast", "softmax"))
    best = numbers(stores / "sigmoid" / "contrast" / "best")
    assert 0 < abs(align["logit_bias"] + 10) < 0.1 and 0 < abs(align["logit_scale"] - math.log(10)) < 0.1
    assert 0 < abs(again["logit_bias"] - align["logit_bias"]) < 0.1
    assert last["logit_bias"] == best["logit_bias"] and 0 < abs(last["logit_scale"] - best["logit_scale"]) < 0.1
    told = [line.get("logit_bias") for line in records(stores / "sigmoid")]
    assert len(told) == 6 and told[3] == pytest.approx(again["logit_bias"])


def test_a_state_whose_objective_holds_the_bias_goes_on(stores):
    """As states of before had it; with an average and an interpolation, whose start has no bias either."""
    more = {"train": "both", "objective": {"kind": "sigmoid"}, "ema": 0.5, "interpolate": 2, "validate_every": 2}
    recipe = tiny_recipe(stores, align=more, contrast={"steps": 2})
    whole = recipe.model_copy(update={"output": str(stores / "bias_whole")})
    assert train(whole)
    parts = recipe.model_copy(update={"output": str(stores / "bias_parts")})
    assert not train(parts, **stopped_after(("align", 3)))
    path = max((stores / "bias_parts" / "state").glob("state-*.pt"))
    state = torch.load(path, weights_only=True)
    state["objective"] = {"bias": state["model"].pop("logit_bias")}
    average = state["average"]["average"]
    average["objective.bias"] = average.pop("logit_bias")
    path.unlink()
    save_state(path.parent, int(path.stem.partition("-")[2]), state)
    assert train(parts, proceed=True)
    assert losses(stores / "bias_parts") == losses(stores / "bias_whole")
    for stage in ("align", "contrast"):
        a, b = (numbers(stores / name / stage / "last") for name in ("bias_parts", "bias_whole"))
        assert a == b


def test_label_smoothing_with_a_sigmoid_loss_is_refused(stores):
    with pytest.raises(ValueError, match="label_smoothing.*a sigmoid has none.*label_smoothing=0"):
        tiny_recipe(stores, align={"objective": {"kind": "sigmoid", "label_smoothing": 0.1}})


def test_label_smoothing_with_a_models_own_sigmoid_is_refused_with_lines_to_type():
    wanted = {"steps": 1, "batch_size": 8, "learning_rate": 1e-3, "objective": {"label_smoothing": 0.1}}
    setting = Stage(train="both", **wanted)
    assert make_objective("align", setting, biased=False).label_smoothing == 0.1
    lines = "stages.align.objective.label_smoothing=0, or stages.align.objective.kind=contrastive"
    with pytest.raises(
        RequestError, match=f"^stages.align.objective.label_smoothing spreads .*a sigmoid, has none: {lines}$"
    ):
        make_objective("align", setting, biased=True)
