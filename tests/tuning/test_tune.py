"""The search: trials fall behind, a search stops, goes on and gives up in words."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import cnclip_ft.cli
from cnclip_ft.evaluation.scores.comparison import hit_table
from cnclip_ft.recipe import dump_recipe
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.retrieval.recall import split_ranks
from cnclip_ft.tuning import outcome
from cnclip_ft.tuning.search import KEPT, Search, seconds_of
from cnclip_ft.tuning.space import given_axes
from cnclip_ft.tuning.trials import Trial, TrialFile, behind
from data_tools.errors import RequestError, UserError
from data_tools.words import said_in
from tests.evaluation.tiny import random_split
from tests.tuning.searches import Fake, recipe, searched, space_of

pytest.importorskip("optuna")


def test_the_first_trial_is_the_recipe_and_the_best_is_found(stores, tmp_path):
    fake = Fake(score=lambda stage: 20 - abs(stage.learning_rate - 2e-3) * 1e3)
    found, lines = searched(stores, tmp_path / "s", fake, trials=24, given=["stages.align.learning_rate=1e-4..1e-2"])
    trials = found.trials["align"]
    assert len(trials) == 24 and trials[0].values == {"learning_rate": 1e-3} and trials[0].state == "complete"
    best = found.winner("align")
    assert best.score == max(t.score for t in trials if t.score is not None) > 19.5
    assert found.recipe.stages["align"].learning_rate == pytest.approx(best.values["learning_rate"])
    assert any(trial.state == "pruned" for trial in trials) and any("the recipe itself" in line for line in lines)
    kept = [trial for trial in trials if (tmp_path / "s/align" / f"{trial.number:04}" / "align/best").is_dir()]
    assert len(kept) == KEPT and best in kept
    assert [name for name, _, _ in fake.runs][-1] == "contrast"  # trained once, as the recipe has it
    assert fake.runs[-1][2].steps == 12 and found.trials["contrast"][0].values == {}


def test_a_stopped_search_goes_on_as_it_would_have_gone(stores, tmp_path):
    score = lambda stage: 10 + 1e3 * stage.learning_rate  # noqa: E731
    whole, _ = searched(stores, tmp_path / "whole", Fake(score))
    with pytest.raises(KeyboardInterrupt):
        searched(stores, tmp_path / "cut", Fake(score, stop_at=4))
    file = tmp_path / "cut/trials.jsonl"
    assert TrialFile(tmp_path / "cut").trials["align", 3].state == "running"
    file.write_bytes(file.read_bytes() + b'{"stage": "align", "numb')  # a kill in the middle of a line
    with pytest.raises(RequestError, match="Continue it with --continue"):
        searched(stores, tmp_path / "cut", Fake(score))
    with pytest.raises(RequestError, match="another recipe"):
        searched(stores, tmp_path / "cut", Fake(score), proceed=True, settings=recipe(stores, "seed=5"))
    again = Fake(score)
    found, _ = searched(stores, tmp_path / "cut", again, proceed=True)
    assert again.runs[0][1] == 3
    assert [(t.values, t.state, t.score) for t in found.trials["align"]] == [
        (t.values, t.state, t.score) for t in whole.trials["align"]
    ]


def test_ctrl_c_is_answered_by_one_line(stores, tmp_path, monkeypatch, capsys):
    def stopped(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "execute", stopped)
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", "tune", "demo", "--trials", "2", "--output", str(tmp_path / "s")])
    monkeypatch.setattr("cnclip_ft.calls.read_recipe", lambda *_: recipe(stores))
    with pytest.raises(SystemExit) as ended:
        cnclip_ft.cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 130 and said.out.startswith("Stopped; the trials") and not said.err


def test_a_budget_too_small_for_one_trial_is_said(stores, tmp_path):
    with pytest.raises(RequestError, match=r"the recipe itself takes about 17m.*--budget"):
        searched(stores, tmp_path / "s", Fake(left=1000.0), budget=60.0)


def test_failing_trials_are_rows_until_all_fail(stores, tmp_path):
    found, lines = searched(stores, tmp_path / "some", Fake(fails=lambda number: number % 2 == 1), trials=5)
    assert [t.state for t in found.trials["align"]] == ["complete", "failed", "complete", "failed", "complete"]
    assert any("out of paper" in line for line in lines)
    with pytest.raises(UserError, match="the recipe itself does not train: out of paper"):
        searched(stores, tmp_path / "all", Fake(fails=lambda number: True))


def test_pictures_that_leak_are_said(stores, tmp_path):
    settings = recipe(stores, f"data.train={stores / 'valid'}", f"data.valid={stores / 'valid'}")
    found, lines = searched(stores, tmp_path / "s", Fake(), trials=1, settings=settings)
    assert "12 pictures of data.valid" in found.warning and any("by heart" in line for line in lines)


def test_requests_that_cannot_be_are_refused(stores, tmp_path):
    for more, says in (
        ({"trials": None}, "--budget 2h, or --trials"),
        ({"stages": ["alinn"]}, "align, contrast"),
        ({"given": ["learning_rate=1,2"]}, "name a key of a searched stage"),
        ({"given": ["stages.align.ema=null,0.9", "stages.align.ema=null,0.9"]}, "given twice"),
    ):
        with pytest.raises(RequestError, match=says):
            Search(recipe(stores), tmp_path, **({"trials": 1} | more))
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(RequestError, match=r"holds mine.txt"):
        searched(stores, tmp_path, Fake())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(RequestError, match="no search to continue"):
        searched(stores, tmp_path / "new", Fake(), proceed=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("5min", 300)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "2", "0h", "-1h"])
def test_budgets_that_are_none(text):
    with pytest.raises(RequestError, match="give a time"):
        seconds_of(text)


def test_the_better_half_goes_on():
    others = [
        Trial("s", number, {}, reports={1: score, 2: score, 3: score}) for number, score in enumerate((5.0, 4.0, 3.0))
    ]

    def given_up(score, number=1, own=9):
        mine = Trial("s", own, {}, reports={number: score})
        return behind(mine, number, [*others, mine])

    assert given_up(3.5) and not given_up(4.5) and not given_up(4.0)
    assert not given_up(0.0, number=3) and given_up(0.0, number=2)  # judged at 1, 2, 4, …
    assert not given_up(0.0, own=0)  # the recipe itself
    assert not behind(others[2], 1, others)  # of three there is no half


# ---- what is said ---------------------------------------------------------------------------------------------------


def test_flattery_is_that_of_choosing():
    """Five models that are equally good but for chance: chosen on one half, the best one falls back on the other."""
    tables = []
    for seed in range(5):
        features = random_split(200, 400, seed=seed, noise=3.0)
        tables.append(hit_table(features, split_ranks(features)))
    found = outcome.measure(tables)
    assert found.among == 5 and found.loss > 0.5 and 0.5 < found.error < 4
    alone = outcome.measure(tables[:1])
    assert abs(alone.loss) < 0.5  # one model is not chosen
    assert f"{found.loss:.2f}" in found.sentence() and f"{found.loss:.2f}" in said_in(found.sentence(), "zh")


def test_what_mattered_is_told_from_what_did_not(stores):
    space = given_axes(
        space_of(stores), ["stages.contrast.learning_rate=1e-4..1e-2", "stages.contrast.weight_decay=0.001,0.1"]
    )
    torch.manual_seed(0)
    trials = [
        Trial(
            "contrast",
            n,
            {"learning_rate": 1e-4 * 100**share, "weight_decay": (0.001, 0.1)[n % 2]},
            "complete",
            50 * share,
        )
        for n, share in enumerate(torch.rand(40).tolist())
    ]
    found = outcome.importance(space, trials)
    assert found["learning_rate"] > 0.8 and outcome.importance(space, trials[:3]) == {}


def test_pages_and_recipe(stores, tmp_path):
    found, _ = searched(stores, tmp_path / "s", Fake(score=lambda stage: 1e3 * stage.learning_rate), trials=9)
    file, page = outcome.write(found, outcome.Flattery(5, 0.4, 1.0), "zh")
    assert load_recipe(file).stages == found.recipe.stages
    text = page.read_text(encoding="utf-8")
    assert (
        text.count("<svg") >= len(found.spaces[0].axes)
        and "各项的影响" in text
        and "0.40" in text
        and "given up" not in text
    )
    english = outcome.write(found, None, "en")[1].read_text(encoding="utf-8")
    assert "What mattered" in english and not re.search("[\u4e00-\u9fff]", english)
    width = 80
    for space in found.spaces:
        for lines in (outcome.trials_table(space, found, width), outcome.settings_table(space, found, {}, width)):
            assert all(len(line) <= width for line in lines.split("\n"))


@pytest.mark.slow
def test_a_search_with_processes_stops_on_request_and_goes_on(stores, tmp_path):
    """Real trials; Ctrl-C in the middle of one leaves its state, and the search goes on with it."""
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe(stores, "stages.align.steps=60", "stages.contrast.steps=6")), encoding="utf-8")
    command = [sys.executable, "-m", "cnclip_ft", "tune", str(file), "--trials", "2", "--output", str(tmp_path / "s")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("s/align/0000/state/*.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Give the same command with --continue" in " ".join(told.split())
    assert "interrupted" not in told
    before = TrialFile(tmp_path / "s").trials["align", 0]
    assert before.state == "running" and before.seconds > 0
    done = subprocess.run([*command, "--continue"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "s/align/0000.log").read_text(encoding="utf-8")
    assert "Continuing stage align" in log
    assert load_recipe(tmp_path / "s/tuned.yaml") and (tmp_path / "s/index.html").is_file()
    trials = TrialFile(tmp_path / "s")
    assert [len(trials.of(name)) for name in ("align", "contrast")] == [2, 2]
    assert isinstance(trials.trials["align", 0].score, float)
    assert (
        list((tmp_path / "s/contrast").glob("*/contrast/best/model.safetensors")) and "Best checkpoint:" in done.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_trial_ends_with_its_search_and_the_next_attempt_waits_for_it(stores, tmp_path, number):
    """No training is left behind, whatever ended the search; gone on with at once, the trial is no failed one."""
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe(stores, "stages.align.steps=300")), encoding="utf-8")
    command = [sys.executable, "-m", "cnclip_ft", "tune", str(file), "--trials", "1", "--output", str(tmp_path / "s")]
    lock = tmp_path / "s/align/0000/cnclip-ft.lock"

    def until(met):
        deadline = time.monotonic() + 240
        while not met():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: list(tmp_path.glob("s/align/0000/state/*.pt")))
    trial = json.loads(lock.read_text(encoding="utf-8"))["pid"]
    process.send_signal(number)
    assert process.wait(120) == (130 if number == signal.SIGTERM else -number)
    again = subprocess.Popen([*command, "--continue"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: not psutil.pid_exists(trial))
        log = tmp_path / "s/align/0000.log"
        until(lambda: "Continuing stage align" in log.read_text(encoding="utf-8"))
        assert "another process" not in log.read_text(encoding="utf-8")
    finally:
        again.send_signal(signal.SIGTERM)
        again.wait(120)
    assert TrialFile(tmp_path / "s").trials["align", 0].state != "failed"


def test_what_a_search_did_not_reach_is_told(stores, tmp_path):
    for place, trials, at_start in (("one", 1, 5.0), ("two", 2, 90.0), ("fine", 2, 5.0)):
        fake = Fake(score=lambda stage: 20 + 1e3 * stage.learning_rate, at_start=at_start)
        found, lines = searched(stores, tmp_path / place, fake, trials=trials)
        told = [str(line) for line in outcome.shortcomings(found, found.spaces[0])]
        page = outcome.write(found, None, "en")[1].read_text(encoding="utf-8")
        assert all(line in page for line in told)
        if place == "one":
            assert len(told) == 1 and "the recipe itself: nothing was compared" in told[0]
        elif place == "two":
            assert len(told) == 1 and "no trial beat its start (90.00)" in told[0]
            assert sum("nothing beat its start" in line for line in lines) == 3  # and the stage that is not searched
        else:
            assert told == []


def test_failures_without_end_end_the_search(stores, tmp_path):
    """They take next to no time, so that a budget alone would never stop them."""
    found, lines = searched(stores, tmp_path / "s", Fake(fails=lambda number: number > 0), trials=None, budget=3600.0)
    assert [t.state for t in found.trials["align"]] == ["complete"] + ["failed"] * 10
    assert any("10 trials in a row failed" in line for line in lines)
