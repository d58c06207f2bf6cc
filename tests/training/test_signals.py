"""Stopped from outside: by a signal to all of its processes, or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnclip_ft.recipe import dump_recipe
from cnclip_ft.training.run_state import load_state
from tests.training.helpers import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


def recipe_of(stores, folder, **changes):
    return tiny_recipe(stores, output=str(folder), feature_cache=str(stores / "cache"), **changes)


SLOWLY = """
import os, signal, sys, time
from functools import partial
import cnclip_ft.training.run as run
def slowly(trainer):
    time.sleep(0.05)
    if trainer.step == 5 and "KILL_WORKER" in os.environ:
        for child in open(f"/proc/self/task/{os.getpid()}/children").read().split():
            os.kill(int(child), signal.SIGKILL)
run.train = partial(run.train, before_step=slowly)
from cnclip_ft.cli import main
sys.argv[0] = "cnclip-ft"
main()
"""


def start(recipe: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **environment)
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "train", str(recipe), *arguments],
        env=env,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def write_recipe(stores, folder, steps=400) -> Path:
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 2}
    recipe = recipe_of(
        stores,
        folder / "run",
        data=data,
        save_every=3,
        align={"steps": 1, "warmup_steps": 0},
        contrast={"steps": steps, "validate_every": 1000},
    )
    (folder / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder / "r.yaml"


def wait_for_state(process: subprocess.Popen, folder: Path) -> None:
    for _ in range(1200):
        if list((folder / "run/state").glob("state-01*.pt")) or process.poll() is not None:
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sends signals to process groups")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_the_whole_group_stops_in_good_order(stores, tmp_path, name):
    process = start(write_recipe(stores, tmp_path))
    wait_for_state(process, tmp_path)
    for _ in range(2):  # as `timeout` does: to the process, then to its group
        os.killpg(process.pid, getattr(signal, name))
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "Stopped. Continue with:" in said and said.count("Stopping after") == 1
    assert load_state(tmp_path / "run/state", print)["step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills loader processes by /proc")
def test_a_killed_loader_is_told_and_a_killed_run_lets_go_of_its_folder(stores, tmp_path):
    recipe = write_recipe(stores, tmp_path)
    said = start(recipe, KILL_WORKER="1").communicate(timeout=200)[0]
    assert "Traceback" not in said and "ended from outside" in said and "Give fewer processes, data.workers=" in said, (
        said[-3000:]
    )
    assert "The newest state is of stage contrast, step" in said
    process = start(tmp_path / "run/recipe.yaml", "--continue")
    wait_for_state(process, tmp_path)
    time.sleep(5)
    process.kill()
    process.wait()
    again = start(tmp_path / "run/recipe.yaml", "--continue", "data.workers=0")
    for line in again.stdout:
        if line.startswith("Continuing stage") or "error" in line:
            break
    assert line.startswith("Continuing stage contrast"), line
    for wait in (0, 1.2):  # a second signal, later: at once
        time.sleep(wait)
        again.send_signal(signal.SIGTERM)
    assert again.wait(60) in (130, -signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sends signals to process groups")
def test_two_processes_stopped_by_their_launcher_exit_130(stores, tmp_path):
    recipe = write_recipe(stores, tmp_path, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "cnclip_ft.launch", "--nproc_per_node", "2", "-m", "cnclip_ft", "train", str(recipe)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for_state(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and said.count("Stopping after") == 1, said[-3000:]
    assert "Traceback" not in said and "Stopped. Continue with: " in said
