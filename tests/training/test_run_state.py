"""States: whole or not there, whatever ends the process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cnclip_ft.recipe import dump_recipe
from cnclip_ft.training import run_state
from cnclip_ft.training.run import train
from cnclip_ft.training.run_state import StateWriter, load_state
from data_tools.errors import UserError
from tests.training.helpers import losses, records, stopped_after, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
def test_thirty_kills_while_states_are_written(tmp_path):
    """Every process goes on from what the one before left, writes states, and is killed at a random moment."""
    kills, reached, chance = 0, 0, random.Random(0)
    while kills < 30:
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:  # tensors this small are copied without the thread pool, which a forked process lacks
                state = load_state(tmp_path, lambda text: None)
                number = state["number"] if state else 0
                writer = StateWriter(tmp_path)
                os.write(tell, b".")
                while True:
                    number += 1
                    writer.save(
                        number, {"step": number, "number": number, "tensor": torch.full((5_000,), float(number))}
                    )
            finally:
                os._exit(1)
        os.read(told, 1)  # a busy machine takes its time to get there
        os.close(told), os.close(tell)
        time.sleep(chance.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        kills += 1
        state = load_state(tmp_path, lambda text: pytest.fail(text))  # none is broken: they are renamed when whole
        if state is not None:
            assert state["number"] >= reached and torch.all(state["tensor"] == state["number"])
            reached = state["number"]
    assert reached > 30


def test_the_copy_is_of_the_moment(tmp_path):
    weights = torch.zeros(3)
    writer = StateWriter(tmp_path)
    writer.save(1, {"step": 1, "weights": weights, "nested": [{"weights": weights}]})
    weights.fill_(9)
    writer.wait()
    state = load_state(tmp_path, print)
    assert state["weights"].tolist() == state["nested"][0]["weights"].tolist() == [0, 0, 0]


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    writer = StateWriter(tmp_path)
    writer.save(1, {"step": 1})
    writer.wait()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state.torch, "save", full)
    writer.save(2, {"step": 2})
    with pytest.raises(UserError, match="No space left.*The one before is intact.*--continue"):
        writer.wait()
    assert [file.name for file in tmp_path.iterdir()] == ["state-000000001.pt"]
    assert load_state(tmp_path, print) == {"step": 1}


@pytest.mark.parametrize("name", ["last", pytest.param("best", marks=pytest.mark.slow)])
def test_a_disk_full_while_a_checkpoint_is_written_loses_nothing(stores, tmp_path, monkeypatch, name):
    """The checkpoint and the state from before stay; with room again the run goes on to the same end."""
    from cnclip_ft.models import checkpoints

    def recipe(output):
        return tiny_recipe(stores, output=str(tmp_path / output), feature_cache=str(stores / "cache"))

    assert train(recipe("whole"))
    original, written = checkpoints.save_tensors, []

    def full(tensors, path):
        written.append(path)
        if f"contrast/cnclip-ft.{name}." in path.as_posix() and written.count(path) == (2 if name == "last" else 1):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        return original(tensors, path)

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(UserError, match=f"{name}: the checkpoint could not be written.*No space left.*intact"):
        train(recipe("full"))
    monkeypatch.undo()
    folder = tmp_path / "full"
    assert not list(folder.rglob("cnclip-ft.*"))
    if name == "last":
        assert checkpoints.read_info(folder / "contrast" / "last")["step"] == 3
    assert load_state(folder / "state", print) is not None
    assert train(recipe("full"), proceed=True)
    assert losses(folder) == losses(tmp_path / "whole")
    for which in ("align/best", "contrast/last", "contrast/best"):
        ours, theirs = (load_file(where / which / "model.safetensors") for where in (folder, tmp_path / "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_ten_interruptions_in_one_run(stores):
    settings = {"steps": 12, "validate_every": 5, "micro_batch_size": 4, "ema": 0.9}
    make = {
        "align": {**settings, "micro_batch_size": None},
        "contrast": settings,
        "feature_cache": str(stores / "cache"),
    }
    assert train(tiny_recipe(stores, output=str(stores / "through"), **make))
    steps = [(name, step) for name in ("align", "contrast") for step in range(1, 12)]
    where = set(random.Random(1).sample(steps, 10))
    recipe = tiny_recipe(stores, output=str(stores / "broken"), **make)
    stops, done = 0, train(recipe, **stopped_after(*where))
    while not done:
        stops += 1
        where -= {(r["stage"], r["step"]) for r in records(stores / "broken")}
        done = train(recipe, proceed=True, **stopped_after(*where))
    assert stops == 10
    for name in ("align/best", "contrast/best", "contrast/last"):
        ours, theirs = (load_file(stores / f / name / "model.safetensors") for f in ("broken", "through"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


KILLED = """
import os, signal, sys
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.run import train
def killed(trainer):
    if (trainer.plan.name, trainer.step) == ("contrast", 7):
        os.kill(os.getpid(), signal.SIGKILL)
train(load_recipe(sys.argv[1]), before_step=killed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
@pytest.mark.slow
def test_killed_between_saves_and_continued(stores, one_thread):
    """kill -9 leaves no chance to write: the run goes on from the newest state and takes the lost steps again."""
    make = {"contrast": {"steps": 8, "validate_every": 4}, "feature_cache": str(stores / "cache"), "save_every": 3}
    assert train(tiny_recipe(stores, output=str(stores / "unkilled"), **make))
    recipe = tiny_recipe(stores, output=str(stores / "killed"), **make)
    (stores / "killed.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(stores / "killed.yaml")], cwd=ROOT, timeout=200, env=env)
    assert done.returncode == -signal.SIGKILL
    state = load_state(stores / "killed" / "state", print)
    assert (state["stage"], state["step"]) in {(1, 6), (1, 4)}  # the writing of step 6 may not have been over
    assert train(recipe, proceed=True)
    ours, theirs = (load_file(stores / f / "contrast/last/model.safetensors") for f in ("killed", "unkilled"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
