"""Whole runs on a tiny model: golden losses, exact continuation, refusals."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cnclip_ft.training.run import train
from cnclip_ft.training.run_state import load_state, save_state
from data_tools.errors import RequestError, UserError
from tests.training.helpers import losses, records, stopped_after, tiny_recipe

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


def test_patches_are_dropped_until_the_last_steps(stores):
    dropped = []

    def watched(trainer):
        if (trainer.plan.name, trainer.step) == ("contrast", 0):
            trainer.model.image_tower.register_forward_pre_hook(
                lambda tower, _: dropped.append(tower.patch_dropout) if tower.training else None
            )

    recipe = tiny_recipe(
        stores,
        output=str(stores / "unmasked"),
        feature_cache=str(stores / "cache"),
        align={"steps": 1, "warmup_steps": 0, "validate_every": 1},
        contrast={"patch_dropout": 0.5, "unmasked_steps": 2},
    )
    assert train(recipe, before_step=watched)
    assert dropped == 4 * [0.5] + 2 * [0.0]


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


def test_a_line_after_going_on_is_over_all_its_steps(stores):
    """Stopped twice between two lines, of which the second state is written in the pause of a validation."""
    timed = {"time", "pairs_per_second", "data_wait", "seconds_per_step", "seconds_left", "mfu"}

    def recipe(name):
        changes = {"log_every": 5, "align": {"steps": 2}, "contrast": {"gradient_clip": 1.0}}
        return tiny_recipe(stores, output=str(stores / name), feature_cache=str(stores / "cache"), **changes)

    assert train(recipe("lines-whole"))
    assert train(recipe("lines-parts"), **stopped_after(("contrast", 2))) is False
    assert train(recipe("lines-parts"), proceed=True, **stopped_after(("contrast", 3))) is False
    state = load_state(stores / "lines-parts/state", pytest.fail)
    assert train(recipe("lines-parts"), proceed=True)
    whole, parts = (
        [{key: value for key, value in line.items() if key not in timed} for line in records(stores / name)]
        for name in ("lines-whole", "lines-parts")
    )
    assert parts == whole and [line["step"] for line in whole] == [2, 5, 6] and "clipped" in whole[1]
    line = next(line for line in records(stores / "lines-parts") if line["step"] == 5)
    assert 5 * line["seconds_per_step"] > state["meter"]["passed"] > 0


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


@pytest.mark.parametrize("skip", [0, 3])
def test_damaged_features_are_named_and_no_rate_is_blamed(stores, tmp_path, skip):
    def recipe(name):
        align = {"skip_bad_steps": skip}
        return tiny_recipe(stores, output=str(tmp_path / name), feature_cache=str(tmp_path / "cache"), align=align)

    assert train(recipe("first"), **stopped_after(("align", 1))) is False
    (file,) = (tmp_path / "cache").glob("*/features.npy")
    array = np.load(file)
    array[0, 5] = np.nan
    np.save(file, array)
    with pytest.raises(
        UserError, match=rf"the loss is nan. {file} is damaged: 1 of 20 .*\(5\). Remove {file.parent}:"
    ) as told:
        train(recipe("second"))
    assert "rate" not in str(told.value)
    shutil.rmtree(file.parent)
    assert train(recipe("first"), proceed=True)


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
