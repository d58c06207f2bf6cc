"""Whole runs on a tiny model: golden losses, exact continuation, refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.run import train
from cnclip_ft.training.run_state import load_state, save_state
from data_tools.errors import RequestError, UserError
from tests.training.helpers import losses, planned, records, stopped_after, tiny_recipe

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def finished(stores):
    recipe = tiny_recipe(stores, output=str(stores / "plain"), feature_cache=str(stores / "cache"))
    assert train(recipe)
    return stores / "plain"


# Losses of this run on torch 2.13 (CPU). They change only when the mathematics does.
GOLDEN = {
    ("align", 1): 2.228444,
    ("align", 2): 2.166629,
    ("align", 3): 2.425408,
    ("align", 4): 2.208910,
    ("align", 5): 2.147898,
    ("align", 6): 2.079187,
    ("contrast", 1): 2.037373,
    ("contrast", 2): 2.173284,
    ("contrast", 3): 2.058504,
    ("contrast", 4): 2.232735,
    ("contrast", 5): 2.169015,
    ("contrast", 6): 1.972205,
}


def test_golden_losses(finished):
    found = losses(finished)
    assert found.keys() == GOLDEN.keys()
    for key, value in GOLDEN.items():
        assert found[key] == pytest.approx(value, abs=1e-4), key


def test_a_cpu_tells_a_step_before_the_next_one_begins(stores):
    """Told later, the time of the next step would be its own, and the last step before a validation would take none."""
    recipe, told = tiny_recipe(stores, output=str(stores / "at-once")), []

    def look(trainer):
        lines = [line for line in records(stores / "at-once", "train") if line["stage"] == trainer.plan.name]
        told.append((trainer.step, len(lines)))

    assert train(recipe, before_step=look)
    assert told == 2 * [(step, step) for step in range(6)]


def test_a_run_leaves_what_it_promises(finished):
    for name in (
        "recipe.yaml",
        "align/best/model.safetensors",
        "align/last/config.json",
        "contrast/best/cnclip_ft.json",
        "report/recall.txt",
        "report/recall.json",
        "report/index.html",
    ):
        assert (finished / name).is_file(), name
    assert list((finished / "tensorboard").glob("events*"))
    rows = json.loads((finished / "report" / "recall.json").read_text(encoding="utf-8"))
    assert list(rows) == ["chance", "start", "after align", "after contrast"]
    info = json.loads((finished / "contrast" / "best" / "cnclip_ft.json").read_text(encoding="utf-8"))
    assert (
        info["languages"] == ["zh"] and info["base_models"] == []
    )  # every second text is Chinese with a word of English
    assert info["stage"] == "contrast" and info["recipe"]["seed"] == 0 and set(info["data"]) == {"train", "valid"}
    validations = records(finished, "validation")
    assert [(v["stage"], v["step"]) for v in validations] == [("start", 0)] + [
        (s, n) for s in ("align", "contrast") for n in (3, 6)
    ]
    assert {"text_to_image", "image_to_text"} <= set(validations[0]["scores"]["valid"])


def test_the_journal_says_how_far_validation_lies_from_training(finished):
    """Losses side by side, norms by part; over the steps since the validation before."""
    lines, judged = records(finished), records(finished, "validation")
    assert judged[0]["loss"] > 0 and "training_loss" not in judged[0]  # the start, by the first stage's batches
    for each in judged[1:]:
        since = [
            r["loss"] for r in lines if r["stage"] == each["stage"] and each["step"] - 3 < r["step"] <= each["step"]
        ]
        assert each["training_loss"] == pytest.approx(sum(since) / 3) and each["loss_batch"] == 8
        assert each["gap"] == pytest.approx(each["loss"] - each["training_loss"])
    frozen, both = lines[0], lines[-1]
    assert frozen["gradient_norms"].keys() == {"text_trunk", "text_projection", "temperature"}
    assert both["relative_updates"].keys() == frozen["gradient_norms"].keys() | {"image_trunk", "image_projection"}
    for line in lines:
        together = sum(norm**2 for norm in line["gradient_norms"].values()) ** 0.5
        assert together == pytest.approx(line["gradient_norm"], rel=1e-5) and "clipped" not in line  # no limit is set
    page = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert page.index("What this run shows") < page.index("<h2>Curves") and "loss (dashed: validation)" in page


def test_a_run_without_tensorboard_is_told_once_and_goes_on(stores, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    short = {"steps": 2, "validate_every": 1}
    assert train(tiny_recipe(stores, output=str(tmp_path / "run"), align=short, contrast=short))
    assert capsys.readouterr().out.count("TensorBoard is not installed") == 1
    assert losses(tmp_path / "run") and not (tmp_path / "run" / "tensorboard").exists()


def test_stage_one_leaves_the_image_tower_alone_and_stage_two_does_not(finished):
    start, _ = __import__("cnclip_ft.models.start", fromlist=["build_start"]).build_start(
        {"architecture": "tiny"}, seed=0
    )
    before = {
        name.removeprefix("image_tower."): t
        for name, t in start.state_dict().items()
        if name.startswith("image_tower.")
    }
    align, contrast = (load_file(finished / stage / "last" / "model.safetensors") for stage in ("align", "contrast"))
    assert all(torch.equal(tensor, align[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, contrast[name]) for name, tensor in before.items())


def test_the_cached_stage_equals_the_uncached_one(stores):
    """Twenty steps: four epochs of the same pictures."""
    found = []
    for name, cached in (("cached-20", True), ("uncached-20", False)):
        align = {"steps": 20, "validate_every": 20, "feature_cache": cached}
        recipe = tiny_recipe(
            stores,
            output=str(stores / name),
            feature_cache=str(stores / "cache"),
            align=align,
            contrast={"steps": 1, "warmup_steps": 0, "validate_every": 1},
        )
        assert train(recipe)
        found.append({step: loss for (stage, step), loss in losses(stores / name).items() if stage == "align"})
    ours, theirs = found
    assert list(ours) == list(theirs) == list(range(1, 21))
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5


def test_patches_are_dropped_until_the_last_steps(stores, monkeypatch):
    dropped, original = [], GradientStep.__call__

    def noting(self, batch):
        dropped.append(self.model.image_tower.patch_dropout)
        return original(self, batch)

    monkeypatch.setattr(GradientStep, "__call__", noting)
    recipe = tiny_recipe(
        stores,
        output=str(stores / "unmasked"),
        feature_cache=str(stores / "cache"),
        align={"steps": 1, "warmup_steps": 0, "validate_every": 1},
        contrast={"patch_dropout": 0.5, "unmasked_steps": 2},
    )
    assert train(recipe)
    assert dropped == [0.0] + 4 * [0.5] + 2 * [0.0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, there is no g++")
def test_the_compiled_towers_give_the_same_losses(stores):
    found = {}  # without dropout: a compiled one draws other numbers
    for name, changes in (("plain", {}), ("compiled", {"compile": True})):
        recipe = tiny_recipe(
            stores,
            output=str(stores / f"no-dropout-{name}"),
            feature_cache=str(stores / "cache"),
            model={
                "start": {
                    "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
                    "text": {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0},
                    "projection": 16,
                }
            },
            **changes,
        )
        assert train(recipe)
        found[name] = losses(stores / f"no-dropout-{name}")
    assert found["compiled"] == pytest.approx(found["plain"], abs=1e-4)


@pytest.mark.parametrize("stage,step", [("align", 1), ("align", 4), ("contrast", 2), ("contrast", 5)])
def test_stopped_and_continued_equals_uninterrupted(stores, finished, capsys, stage, step):
    recipe = tiny_recipe(stores, output=str(stores / f"stopped-{stage}-{step}"), feature_cache=str(stores / "cache"))
    folder = stores / f"stopped-{stage}-{step}"
    assert train(recipe, **stopped_after((stage, step))) is False
    assert "--continue" in capsys.readouterr().out
    assert train(recipe, proceed=True)
    assert losses(folder) == losses(finished)
    ours, theirs = ({(r["stage"], r["step"]): r for r in records(place, "validation")} for place in (folder, finished))
    assert ours.keys() == theirs.keys()
    for key, judged in theirs.items():  # the mean goes over the steps before the stop, too
        assert ours[key].get("training_loss") == judged.get("training_loss"), key
        # Features depend in their last bit on where tensors lie in memory.
        assert ours[key]["loss"] == pytest.approx(judged["loss"], rel=1e-6), key
    for name in ("align/best", "contrast/best", "contrast/last"):
        ours, theirs = (load_file(where / name / "model.safetensors") for where in (folder, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert (folder / "report" / "recall.txt").read_text() == (finished / "report" / "recall.txt").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4},
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in ({"ema": 0.9}, {"gradient_checkpointing": "both"}, {"patch_dropout": 0.5})
        ),
    ],
)
def test_stopped_and_continued_with_other_settings(stores, changes):
    name = next(iter(changes))
    whole = tiny_recipe(
        stores, output=str(stores / f"whole-{name}"), contrast=changes, feature_cache=str(stores / "cache")
    )
    parts = tiny_recipe(
        stores, output=str(stores / f"parts-{name}"), contrast=changes, feature_cache=str(stores / "cache")
    )
    assert train(whole)
    assert train(parts, **stopped_after(("contrast", 4))) is False
    assert train(parts, proceed=True)
    assert losses(stores / f"whole-{name}") == losses(stores / f"parts-{name}")
    ours, theirs = (
        load_file(stores / f"{kind}-{name}" / "contrast" / "last" / "model.safetensors") for kind in ("parts", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_bad_number_stops_with_advice_and_keeps_the_last_good_checkpoint(stores):
    recipe = tiny_recipe(stores, output=str(stores / "nan"), feature_cache=str(stores / "cache"))

    def poisoned(trainer):
        if (trainer.plan.name, trainer.step) == ("contrast", 4):
            trainer.model.logit_scale.data.fill_(float("nan"))

    with pytest.raises(
        UserError, match="stage contrast, step 5: the loss is nan.*lower rate, stages.contrast.learning_rate="
    ):
        train(recipe, before_step=poisoned)
    kept = load_file(stores / "nan" / "contrast" / "last" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_a_folder_with_a_run_is_not_overwritten(stores, finished):
    recipe = tiny_recipe(stores, output=str(finished), feature_cache=str(stores / "cache"))
    with pytest.raises(RequestError, match="holds a run already.*--continue.*--overwrite"):
        train(recipe)
    with pytest.raises(RequestError, match="finished. Train it further .*--continue stages.contrast.steps=12"):
        train(recipe, proceed=True)


def test_continuing_with_another_recipe_is_refused(stores):
    recipe = tiny_recipe(stores, output=str(stores / "other"), feature_cache=str(stores / "cache"))
    assert train(recipe, **stopped_after(("align", 2))) is False
    changed = tiny_recipe(stores, output=str(stores / "other"), align={"learning_rate": 5e-4}, log_every=2)
    with pytest.raises(RequestError, match=r"stages.align.learning_rate: 0.001 → 0.0005"):
        train(changed, proceed=True)


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"align": {"batch_size": 100}}, r"batch size \(100\) is larger than the training split"),
        ({"data": {"train": "nowhere", "valid": "nowhere"}}, "data.train: nowhere: no such folder"),
        ({"model": {"start": {"architecture": "huge"}}}, "'huge' is not known"),
        ({"model": {"start": "no/such/checkpoint"}}, "no/such/checkpoint"),
        (
            {"align": {"warmup_steps": None, "steps": None, "epochs": 0.2, "train": [{"tower": "text"}]}},
            "no rule covers",
        ),
        ({"precision": "fp16"}, "fp16 needs a CUDA device"),
        ({"output": "/proc/run"}, "cannot be written"),
    ],
)
def test_refusals(stores, changes, expected):
    recipe = tiny_recipe(stores, **{"output": str(stores / "refused"), **changes})
    with pytest.raises(RequestError, match=expected):
        train(recipe)


def test_the_plan_says_what_will_happen_and_warns(stores):
    from cnclip_ft.training.advice import refuse_warnings
    from cnclip_ft.training.plan import describe

    recipe = tiny_recipe(stores, data={"train": str(stores / "train"), "valid": str(stores / "train"), "workers": 0})
    context, model, plans = planned(recipe)
    text = describe(context, model, plans)
    for part in (
        "stage align",
        "frozen",
        "rate 0.001",
        "6 steps",
        "computed once",
        "fp32",
        "WARNING",
        "leaves few negatives",
        "is the training split itself",
        "new      text_tower",
        "warm-up 1 step, then cosine",
    ):
        assert part in text, part
    for workers, said in ((1, "by 1 worker process\n"), (2, "by 2 worker processes\n")):
        data = {"train": str(stores / "train"), "valid": str(stores / "train"), "workers": workers}
        assert said in describe(*planned(tiny_recipe(stores, data=data)))
    with pytest.raises(RequestError, match="--strict"):
        refuse_warnings(context, model, plans)
    assert not (stores / "run").exists()


def test_every_warning_of_the_plan_is_said(stores, tmp_path):
    """Each with its suggestion; none of them where nothing is wrong."""
    from cnclip_ft.models.checkpoints import save_checkpoint
    from cnclip_ft.training.advice import warnings
    from tests.training.helpers import tiny_model

    save_checkpoint(tiny_model(), tmp_path / "start", info={})

    def said(valid="valid", **contrast):
        data = {"train": str(stores / "train"), "valid": str(stores / valid), "workers": 0}
        stage = {"steps": 60, "batch_size": 16, "learning_rate": 1e-7, "warmup_steps": 1, "train": "both"} | contrast
        recipe = tiny_recipe(tmp_path, data=data, model={"start": str(tmp_path / "start")}, stages={"contrast": stage})
        recipe = recipe.model_copy(update={"stages": {"contrast": recipe.stages["contrast"]}})
        context, model, plans = planned(recipe)
        return warnings(context, model, plans)

    assert said() == []
    for changes, words in (
        (
            {"learning_rate": 1e-3},
            r"rate 0\.001 is high for a global batch of 16 .* suggest about stages.contrast.learning_rate=2\.0e-06",
        ),
        ({"batch_size": 8}, r"batch 8 leaves few negatives; give stages.contrast.batch_size=16 or more"),
        ({"steps": 20}, r"only 20 steps; give more, stages.contrast.steps=100"),
        ({"valid": "train"}, r"valid is the training split itself: recall will look far better"),
    ):
        (warning,) = said(**changes)
        assert re.search(words, warning), warning

    from data_tools.store import StoreWriter, open_store

    source = open_store(stores / "train")
    with StoreWriter(tmp_path / "leaking") as writer:  # one picture of the training split under its id
        writer.add_image(3, source.image(3))
        writer.add_pair(3, 0, "图片", "zh")
        writer.finish()
    data = {"train": str(stores / "train"), "valid": str(tmp_path / "leaking"), "workers": 0}
    context, model, plans = planned(tiny_recipe(tmp_path, data=data))
    assert any(
        "shares images with the training split (e.g. id 3)" in warning for warning in warnings(context, model, plans)
    )


def test_a_broken_newest_state_falls_back(tmp_path):
    for number in range(4):
        save_state(tmp_path, number, {"step": number})
    assert len(list(tmp_path.glob("state-*.pt"))) == 2
    newest = max(tmp_path.glob("state-*.pt"))
    newest.write_bytes(newest.read_bytes()[:100])
    said = []
    assert load_state(tmp_path, said.append) == {"step": 2}
    assert "broken" in said[0]


def test_a_damaged_image_is_replaced_up_to_the_limit(stores, tmp_path):
    from data_tools.store import StoreWriter, open_store

    source = open_store(stores / "train")
    with StoreWriter(tmp_path / "train") as writer:
        for image_id in source.image_ids:
            writer.add_image(image_id, b"broken" if image_id == 3 else source.image(image_id))
        for pair in source.pairs():
            writer.add_pair(pair.image_id, pair.text_id, pair.text, pair.language)
        writer.finish()
    data = {"train": str(tmp_path / "train"), "valid": str(stores / "valid"), "workers": 0}
    for cached in (True, False):
        recipe = tiny_recipe(
            tmp_path, data=data, output=str(tmp_path / f"run{cached}"), align={"feature_cache": cached}
        )
        assert train(recipe)
        strict = tiny_recipe(
            tmp_path,
            data=data | {"max_damaged_images": 0},
            output=str(tmp_path / f"strict{cached}"),
            feature_cache=str(tmp_path / f"c{cached}"),
            align={"feature_cache": cached, "epochs": 2, "steps": None},
        )
        with pytest.raises(UserError, match="image 3|damaged images"):
            train(strict)


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
