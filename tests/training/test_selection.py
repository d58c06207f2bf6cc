"""What is kept and when a stage is over: plateau, guard, named best, interpolation, low-rank updates, bad steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cnclip_ft
from cnclip_ft.models.checkpoints import read_info
from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_data import Guard
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training import kept as keeping
from cnclip_ft.training.examples import Example, Retrieved, draw_panel
from cnclip_ft.training.run import train
from cnclip_ft.training.selection import Selection
from cnclip_ft.training.validation import Judge
from data_tools.errors import RequestError, UserError
from data_tools.words import said_in
from tests.training.helpers import planned, stopped_after, tiny_recipe


def run_of(stores, name, **changes):
    """A recipe with one stage, `contrast`, and the folder it will run in."""
    recipe = tiny_recipe(stores, output=str(stores / name), feature_cache=str(stores / "cache"), **changes)
    recipe.stages.pop("align")
    return recipe, stores / name


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def scripted(monkeypatch, scores):
    """The first split's mean recall at every judgement, in this order; the last one stays. Returns the list of those given."""
    given = iter(scores)
    original, last, judged = Judge.__call__, [None], []

    def judge(self, model):
        judgement = original(self, model)
        last[0] = next(given, last[0])
        judged.append(last[0])
        first, guard = last[0] if isinstance(last[0], tuple) else (last[0], None)
        scores = next(iter(judgement.scores.values()))
        for direction in (scores.text_to_image, scores.image_to_text):
            direction.recall = dict.fromkeys(direction.recall, first)
        judgement.guard = guard
        return judgement

    monkeypatch.setattr(Judge, "__call__", judge)
    return judged


def test_a_plateau_ends_the_stage(stores, monkeypatch, capsys):
    scripted(monkeypatch, [1, 20, 30, 30.05, 30.09, 40, 41])
    recipe, folder = run_of(
        stores,
        "plateau",
        contrast={"steps": 12, "validate_every": 1, "until": "plateau", "min_gain": 0.1, "patience": 2},
    )
    assert train(recipe)
    assert [r["step"] for r in records(folder, "validation") if r["stage"] == "contrast"] == [1, 2, 3, 4]
    assert "ends at step 4 of 12: plateau: no rise of 0.1 or more above 30.00" in capsys.readouterr().out
    assert read_info(folder / "contrast" / "best")["step"] == 4  # 30.09 is the highest, though no gain
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert (
        page.count("<p>contrast ends at step 4 of 12: plateau: no rise of 0.1 or more above 30.00 in 2 validations</p>")
        == 1
    )


def test_a_plateau_survives_being_continued(stores, monkeypatch):
    scripted(monkeypatch, [1, 20, 20, 20, 20, 20, 20])
    recipe, folder = run_of(
        stores, "plateau-2", contrast={"steps": 12, "validate_every": 1, "until": "plateau", "patience": 3}
    )
    assert train(recipe, **stopped_after(("contrast", 2))) is False
    assert train(recipe, proceed=True)
    assert max(r["step"] for r in records(folder, "validation")) == 4


def with_guard(stores, name, action, **changes):
    data = {
        "train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0,
        "guard": {"split": str(stores / "valid"), "max_drop": 2, "action": action},
    }  # fmt: skip
    return run_of(stores, name, data=data, contrast={"steps": 4, "validate_every": 1, **changes})


def test_a_guard_reports(stores, monkeypatch, capsys):
    scripted(monkeypatch, [(10, 50), (20, 49), (30, 47), (40, 46), (50, 45)])
    recipe, folder = with_guard(stores, "guard", "report")
    assert train(recipe)
    said = capsys.readouterr().out
    assert "guard 49.00 (-1.00)\n" in said
    assert "guard 47.00 (-3.00) DROPPED BY MORE THAN 2" in said
    assert read_info(folder / "contrast" / "best")["step"] == 4
    assert records(folder, "validation")[1]["scores"]["guard"] == {"mean_recall": 49}


def test_a_guard_stops_and_its_breach_is_never_the_best(stores, monkeypatch, capsys):
    scripted(monkeypatch, [(10, 50), (20, 49), (30, 47), (40, 46)])
    recipe, folder = with_guard(stores, "guard-stop", "stop")
    assert train(recipe)
    assert "the guard split lost more than data.guard.max_drop allows" in capsys.readouterr().out
    assert read_info(folder / "contrast" / "best")["step"] == 1
    assert read_info(folder / "contrast" / "last")["step"] == 2


def test_a_guard_broken_at_once_keeps_the_start(stores, monkeypatch, capsys):
    scripted(monkeypatch, [(10, 50), (20, 40)])
    recipe, folder = with_guard(stores, "guard-none", "stop")
    assert train(recipe)
    said = capsys.readouterr().out
    assert "The run ends with stage contrast: the guard split lost more" in said
    assert "no validation within the guard's limit beat its start" in said and "or data.guard.max_drop=" in said
    assert "best so far" not in said
    assert read_info(folder / "contrast" / "best")["step"] == 0
    assert read_info(folder / "contrast" / "last")["step"] == 1


def test_what_is_said_of_a_guard_without_any_drop_can_help(stores, monkeypatch, capsys):
    scripted(monkeypatch, [(10, 50), (20, 49)])
    guard = {"split": str(stores / "valid"), "max_drop": 0, "action": "stop"}
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0, "guard": guard}
    recipe, _ = run_of(stores, "guard-zero", data=data, contrast={"steps": 4, "validate_every": 1})
    assert train(recipe)
    assert "or data.guard.max_drop=1\n" in capsys.readouterr().out


def test_a_stage_that_brings_nothing_keeps_its_start(stores, monkeypatch, capsys):
    """The start is the first candidate, not judged twice, and its weights are those of the stage before."""
    judged = scripted(monkeypatch, [10, 20, 30, 30, 25, 30])
    recipe = tiny_recipe(
        stores, output=str(stores / "nothing"), feature_cache=str(stores / "cache"), contrast={"interpolate": 2}
    )
    folder = stores / "nothing"
    assert train(recipe)
    assert len(judged) == 6  # the start, two validations a stage, the report
    info = read_info(folder / "contrast" / "best")
    assert (info["stage"], info["step"], info["mean_recall"]) == ("contrast", 0, 30)
    kept, before = (load_file(folder / stage / "best" / "model.safetensors") for stage in ("contrast", "align"))
    assert all(torch.equal(kept[name], before[name]) for name in before)
    rows = json.loads((folder / "report" / "recall.json").read_text(encoding="utf-8"))
    assert rows["after contrast"] == rows["after align"]
    note = "stage contrast brought nothing: no validation beat its start (30.00), which stays"
    assert records(folder, "unchanged")[0]["stage"] == "contrast"
    said = capsys.readouterr().out
    assert "(best 30.00 where the stage began)" in said and f"contrast/best ({note})" in said
    assert all(note in (folder / "report" / name).read_text(encoding="utf-8") for name in ("recall.txt", "index.html"))
    assert sorted(path.name for path in (folder / "contrast").iterdir()) == ["best", "last"]


def test_a_plateau_counts_from_the_start():
    setting = tiny_stage(until="plateau", min_gain=1, patience=2)
    selection = Selection(setting)
    selection.begin(30, {})
    for step, score in enumerate((30.5, 29), 1):
        selection.take(step, score, {})
    assert selection.so_far.ended == "plateau: no rise of 1 or more above 30.00 in 2 validations"
    assert (selection.so_far.best, selection.so_far.best_step) == (30.5, 1)
    again = Selection(setting)
    again.load_state_dict(json.loads(json.dumps(selection.state_dict())))  # a state holds plain values
    assert again.so_far == selection.so_far
    assert said_in(again.so_far.ended, "zh") == "进入平台期：连续 2 次验证没有比 30.00 高出 1 或更多"
    again.load_state_dict(selection.state_dict() | {"ended": "plateau"})  # of the version before
    assert said_in(again.so_far.ended, "zh") == "plateau"


def test_boxes_learnt_beat_a_start_that_has_learnt_none():
    """Before the first hit all weights score 0: those that were trained stay, not the heads as they were drawn."""
    boxes = Stage(kind="ground", ground={"boxes": "boxes"}, train="heads", steps=6, batch_size=8, learning_rate=1e-3)
    for setting, kept in ((boxes, 3), (tiny_stage(), 0)):
        selection = Selection(setting)
        selection.begin(0.0, {})
        selection.take(3, 0.0, {})
        selection.take(6, 0.0, {})
        assert selection.so_far.best_step == kept
        selection.take(9, -1.0, {})
        assert selection.so_far.best_step == kept


def test_a_stage_begun_without_a_score_of_its_start_goes_on_as_before():
    """States of the version before hold none: the first validation is the best, and what breaks the guard never is."""
    selection = Selection(tiny_stage(), Guard(split="general", max_drop=2, action="stop"), guard_start=50)
    before = {
        "best": float("-inf"),
        "best_step": 0,
        "best_row": {},
        "risen_to": float("-inf"),
        "without_rise": 0,
        "ended": None,
        "guard_broken": False,
        "sums": {},
    }
    selection.load_state_dict(before)
    assert not selection.beats(90, 47) and selection.beats(5, 48)
    selection.take(3, 5, {"mean_recall": 5}, 48)
    assert selection.state_dict() | {"sums": {}} == before | {"best": 5, "best_step": 3, "best_row": {"mean_recall": 5}}
    selection.take(6, 90, {}, 40)
    assert selection.so_far.guard_broken and selection.so_far.best_step == 3


def tiny_stage(**changes):
    return Stage(train="both", steps=6, batch_size=8, learning_rate=1e-3, **changes)


def test_best_by_a_named_score_of_a_named_split(stores):
    valid = {"mine": str(stores / "valid"), "other": str(stores / "train")}
    data = {"train": str(stores / "train"), "valid": valid, "workers": 0}
    recipe, folder = run_of(stores, "named", data=data, best_by="other: image_to_text.r5")
    assert train(recipe)
    judged = records(folder, "validation")  # the start is the first candidate
    best = max(judged, key=lambda r: (r["scores"]["other"]["image_to_text"]["r5"], -r["step"]))
    assert read_info(folder / "contrast" / "best")["step"] == best["step"]
    assert set(judged[0]["scores"]) == {"mine", "other"}
    assert set(judged[0]["scores"]["mine"]["by_language"]) == {"zh", "mixed"}


@pytest.mark.parametrize(
    "override,expected",
    [("best_by=recall", "'recall' is not a score"), ("best_by='there: mean_recall'", "names the split 'there'")],
)
def test_unknown_scores_are_refused(override, expected):
    with pytest.raises(RequestError, match=expected):
        load_recipe("demo", [override])


def test_interpolation_keeps_the_best_share(stores, monkeypatch, capsys):
    #                       start, 2 validations, α = 0 … 1, the report
    scripted(monkeypatch, [1, 20, 30, 10, 35, 50, 40, 30, 50])
    recipe, folder = run_of(stores, "mixed", contrast={"steps": 2, "validate_every": 1, "interpolate": 4})
    assert train(recipe)
    said = capsys.readouterr().out
    assert "α 0.50   50.00  kept" in said
    best = read_info(folder / "contrast" / "best")
    assert best["interpolated"] == 0.5 and best["mean_recall"] == 50
    start = cnclip_ft.models.start.build_start({"architecture": "tiny"}, seed=0)[0].state_dict()
    end = load_file(folder / "contrast" / "last" / "model.safetensors")
    kept = load_file(folder / "contrast" / "best" / "model.safetensors")
    name = "text_projection.weight"
    expected = (start[f"text_tower.{name}"] + end[name]) / 2
    assert torch.allclose(kept[name], expected, atol=1e-7)
    assert not (folder / "contrast" / "start").exists()


def test_interpolation_that_does_not_win_changes_nothing(stores, monkeypatch, capsys):
    scripted(monkeypatch, [1, 20, 30, 10, 20, 30, 30])
    recipe, folder = run_of(stores, "unmixed", contrast={"steps": 2, "validate_every": 1, "interpolate": 2})
    assert train(recipe)
    assert "none beats the best checkpoint" in capsys.readouterr().out
    assert "interpolated" not in read_info(folder / "contrast" / "best")


LORA = [
    {"tower": "image", "part": "last 1", "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}},
    {"tower": "image", "part": "rest", "rate": 0},
    {"tower": "text", "lora": {"rank": 4}},
    {"tower": "temperature"},
]


def test_lora_trains_little_and_leaves_plain_checkpoints(stores, capsys):
    recipe, folder = run_of(stores, "lora", contrast={"train": LORA, "learning_rate": 1e-2})
    assert train(recipe)
    assert "as low-rank updates of rank 4" in capsys.readouterr().out
    start = cnclip_ft.models.start.build_start({"architecture": "tiny"}, seed=0)[0].state_dict()
    model = cnclip_ft.load(folder / "contrast" / "last")
    after = model.state_dict()
    assert after.keys() == start.keys()
    moved = {name for name in start if not torch.equal(start[name], after[name])} - {"logit_scale"}
    assert moved and all(name.endswith("weight") for name in moved)
    assert not any("embedding" in name or "norm" in name.lower() for name in moved)
    for name in moved:
        difference = (after[name] - start[name]).double()
        rank = torch.linalg.matrix_rank(difference, rtol=1e-4).item()
        assert rank <= (2 if name.startswith("image") else 4), name
    # What was judged is what was kept.
    stored = read_info(folder / "contrast" / "last")
    from cnclip_ft.features.encode import encode_split
    from cnclip_ft.retrieval.recall import recall
    from data_tools.store import open_store

    again = recall(encode_split(model, open_store(stores / "valid")))
    assert again.mean_recall == pytest.approx(stored["mean_recall"])


def test_lora_continues_exactly(stores):
    whole, whole_folder = run_of(stores, "lora-whole", contrast={"train": LORA})
    parts, folder = run_of(stores, "lora-parts", contrast={"train": LORA})
    assert train(whole)
    assert train(parts, **stopped_after(("contrast", 4))) is False
    assert train(parts, proceed=True)
    ours, theirs = (load_file(f / "contrast" / "last" / "model.safetensors") for f in (folder, whole_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "interpolated,scores,kept",
    [
        #  start, validations at 2 and 3, α = 0 … 1; killed when the mixed weights are in place; the report
        (True, [1, 20, 30, 10, 35, 50, 40, 30, 50], 50),
        #  start, validation at 2, killed when it is kept; judged anew, it scores lower, as on devices that round otherwise
        (False, [1, 20, 15, 10, 5, 5, 5, 5, 5, 20], 20),
    ],
)
def test_a_run_killed_after_its_best_was_kept_goes_on(stores, monkeypatch, interpolated, scores, kept):
    """What was kept after the newest state counts, and is not mixed twice."""
    scripted(monkeypatch, scores)
    changes = {"steps": 3, "validate_every": 2, "interpolate": 4}
    recipe, folder = run_of(stores, f"killed-{interpolated}", save_every=1, contrast=changes)
    original = keeping.save_checkpoint

    def dying(model, place, *, info):
        checksum = original(model, place, info=info)
        if place.name == "best" and ("interpolated" in info) == interpolated:
            raise SystemExit("killed")
        return checksum

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "save_checkpoint", dying)
        with pytest.raises(SystemExit):
            train(recipe)
    before = (folder / "contrast/best/model.safetensors").read_bytes()
    assert train(recipe, proceed=True)
    assert (folder / "contrast/best/model.safetensors").read_bytes() == before
    table = json.loads((folder / "report/recall.json").read_text(encoding="utf-8"))
    assert table["after contrast"]["mean_recall"] == kept
    assert sorted(path.name for path in (folder / "contrast").iterdir()) == ["best", "last"]


def test_single_bad_steps_are_skipped_up_to_the_limit(stores, capsys):
    recipe, folder = run_of(stores, "skip", contrast={"skip_bad_steps": 1})
    bad, good = {2}, []

    def poisoned(trainer):
        if good:
            trainer.model.logit_scale.data.copy_(good.pop())
        if trainer.step in bad:
            good.append(trainer.model.logit_scale.data.clone())
            trainer.model.logit_scale.data.fill_(float("nan"))

    assert train(recipe, before_step=poisoned)
    assert "the loss is nan: step skipped (1 of at most 1)" in capsys.readouterr().out
    kept = load_file(folder / "contrast" / "last" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    bad = {2, 3}
    with pytest.raises(UserError, match="step 4: the loss is nan"):
        train(recipe, overwrite=True, before_step=poisoned)


def test_out_of_memory_names_settings_that_help(stores, monkeypatch):
    recipe, folder = run_of(stores, "memory")

    def full(self, batch):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried …"
        )

    monkeypatch.setattr("cnclip_ft.training.large_batch.GradientStep.__call__", full)
    with pytest.raises(
        UserError, match=r"step 1: out of memory.*8 pairs at once.*stages.contrast.micro_batch_size=4.*gradient_check"
    ):
        train(recipe)


def test_the_page_is_whole(stores, capsys):
    recipe, folder = run_of(stores, "page")
    assert train(recipe)
    foretold = r"contrast: about \d+:\d\d to go \(\d+:\d\d of steps, 2 validations of \d+:\d\d\)"
    assert re.search(foretold, capsys.readouterr().out)
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    for part in (
        "Recall before and after",
        "after contrast",
        "<svg",
        "data:image/jpeg",
        "class=right",
        "stage contrast",
        "learning_rate: 0.001",
    ):
        assert part in page, part
    assert "src='http" not in page and "href=" not in page  # base64 may hold the letters, not the sign


def test_right_pictures_are_framed():
    picture = Image.new("RGB", (112, 112), "blue")
    panel = draw_panel([Example("a dog", [Retrieved(picture, 0.5, True), Retrieved(picture, 0.4, False)])])
    colours = {colour for _, colour in panel.getcolors(10**6)}
    assert (24, 150, 70) in colours and (0, 0, 255) in colours
    plain = draw_panel([Example("a dog", [Retrieved(picture, 0.4, False)])])
    assert (24, 150, 70) not in {colour for _, colour in plain.getcolors(10**6)}


@pytest.mark.parametrize("name,expected", [("nothing", "'nothing' is not known"), ("wandb", "wandb is not installed")])
def test_trackers_are_checked_first(stores, name, expected):
    recipe, _ = run_of(stores, "tracked", report_to=[name])
    with pytest.raises(RequestError, match=expected):
        planned(recipe)


def test_numbers_reach_other_trackers(stores):
    recipe, folder = run_of(stores, "tensorboard", report_to=["tensorboard"])
    assert train(recipe)
    assert list((folder / "cnclip-ft").glob("events*"))


def test_memory_is_estimated(stores):
    from cnclip_ft.training.memory import estimate

    recipe, _ = run_of(stores, "estimate")
    context, model, (plan,) = planned(recipe)
    memory = estimate(context, plan, model)
    parameters = sum(p.numel() for p in model.parameters())
    assert memory.weights == memory.gradients == 4 * parameters and memory.optimizer == 8 * parameters
    plain = memory.activations
    lighter = replace(plan, setting=plan.setting.model_copy(update={"gradient_checkpointing": "both"}))
    assert 0 < estimate(context, lighter, model).activations < plain
