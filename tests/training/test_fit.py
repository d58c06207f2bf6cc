"""What fits: tried on a GPU, by an estimate on a CPU, which is held against what a process takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnclip_ft.runtime import _left_in_groups
from cnclip_ft.training import fit, memory
from cnclip_ft.training.advice import warnings
from cnclip_ft.training.fit import micro_batch_size, try_step
from cnclip_ft.training.memory import HOPELESS, MARGIN, estimate, largest_half
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.training.helpers import planned, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prepared(stores):
    """Context, plan and model of a stage that trains both towers."""
    recipe = tiny_recipe(stores, output=str(stores / "fit"), align={"feature_cache": False})
    context, model, plans = planned(recipe)
    return context, plans[1], model


@pytest.mark.parametrize("room,expected", [(8, 8), (7, 4), (4, 4), (3, 2), (1, 1), (0, 1)])
def test_halves_until_it_fits(room, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= room

    assert largest_half(8, fits) == expected
    assert tried == sorted(tried, reverse=True) and tried[0] == 8
    assert 1 not in tried  # nothing smaller is left to say


def test_a_trial_is_a_whole_forward_and_backward(prepared):
    context, plan, model = prepared
    model.register_buffer("running_mean", torch.zeros(2))
    model.register_forward_hook(lambda *_: [model.running_mean.add_(1), None][1])
    try_step(context, plan, model, 3, list(model.parameters()))
    assert not model.running_mean.any()  # blank pictures teach batch norm nothing
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) > 20 and all(torch.isfinite(grad).all() for grad in grads)


def test_what_a_step_without_memory_had_computed_is_freed_before_others_are_tried(prepared, monkeypatch):
    """On a card its activations would take the room of what is tried; here they only have to be gone."""
    context, plan, model = prepared
    kept = []

    def step():
        activations = torch.ones(3)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def largest(*_):
        assert kept[0]() is None
        return 2

    monkeypatch.setattr(fit, "largest_that_fits", largest)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    card = SimpleNamespace(device=torch.device("cuda"), sharding=context.sharding, precision="bf16")
    try:
        step()
    except torch.OutOfMemoryError as error:
        assert kept[0]() is not None
        said = fit.out_of_memory(card, plan, model, error, step=1, at_once=8, to_come=[])
    assert "micro_batch_size=2 (fits, tried just now" in str(said)


def with_room_for(pairs, prepared, monkeypatch):
    """As if so many pairs at once were all that the machine had memory for, the margin included."""
    context, plan, model = prepared
    need = estimate(context, plan, model)
    activations = pairs * need.activations / plan.share
    monkeypatch.setattr(
        memory, "available_memory", lambda: int((need.gradients + need.optimizer + activations) / MARGIN) + 1
    )


on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="of a CPU")


@on_a_cpu
@pytest.mark.parametrize("room,expected", [(8, None), (7.9, 4), (3, 2), (0, 1)])
def test_auto_takes_on_a_cpu_what_the_estimate_allows(prepared, monkeypatch, room, expected):
    context, plan, model = prepared
    with_room_for(room, prepared, monkeypatch)
    plan = replace(plan, setting=plan.setting.model_copy(update={"micro_batch_size": "auto"}))
    assert micro_batch_size(context, plan, model, []) == expected
    whole = replace(plan, setting=plan.setting.model_copy(update={"micro_batch_size": None}))
    part = estimate(context, plan, model).activations / estimate(context, whole, model).activations
    assert part == (expected or 8) / 8


@on_a_cpu
def test_too_little_memory_is_said_and_far_too_little_refused(stores, prepared, monkeypatch):
    context, plan, model = prepared
    need = estimate(context, plan, model)
    assert need.shortage("contrast") is None
    recipe = tiny_recipe(stores, output=str(stores / "narrow"), align={"feature_cache": False})
    words = r"contrast: training takes about .* Give stages\.contrast\.micro_batch_size=1 \(same gradient"
    monkeypatch.setattr(memory, "available_memory", lambda: int(need.to_come / HOPELESS) + 2)
    said = [warning for warning in warnings(context, model, [plan]) if "training takes" in warning]
    assert len(said) == 1 and re.search(words, said[0])
    alone = replace(plan, setting=plan.setting.model_copy(update={"micro_batch_size": 1}))
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    assert "smaller model" in (estimate(context, alone, model).shortage("contrast") or "")
    monkeypatch.setattr(memory, "available_memory", lambda: int(need.to_come / HOPELESS) - 2)
    with pytest.raises(RequestError, match=words):
        train(recipe)
    assert not (stores / "narrow" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "line,limit,taken,spare,root",
    [
        ("0::/job/step", "memory.max", "memory.current", "inactive_file", ""),
        ("9:memory:/job/step", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory"),
    ],
)
def test_control_groups_set_limits(tmp_path, line, limit, taken, spare, root):
    own, top = tmp_path / "cgroup", tmp_path / "fs" / root
    for folder, most in ((top / "job", "1000"), (top / "job" / "step", "max")):
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / taken).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 1\n{spare} 50\n")
    own.write_text(f"3:cpu:/other\n{line}\n")
    assert list(_left_in_groups(own, tmp_path / "fs")) == [350]
    assert list(_left_in_groups(tmp_path / "none", tmp_path / "fs")) == []


HELD = """
import sys
from pathlib import Path
import torch
from cnclip_ft.training.fit import micro_batch_size
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.memory import blank_pairs, estimate
from cnclip_ft.training.optimizer import apply_entries, build_optimizer
from tests.training.helpers import planned, tiny_recipe
def now(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
vit = {"kind": "vit", "hidden": 128, "layers": 4, "heads": 2, "patch": 16, "image_size": 224}
text = {"hidden": 64, "layers": 2, "heads": 2, "vocabulary": 21128}
recipe = tiny_recipe(
    Path(sys.argv[1]), output=sys.argv[1] + "/held", align={"batch_size": 32},
    contrast={"batch_size": 32, "gradient_checkpointing": sys.argv[2]},
    model={"start": {"image": vit, "text": text, "projection": 64}},
)
context, model, (_, plan) = planned(recipe)
said = estimate(context, plan, model).to_come
apply_entries(model, list(plan.entries))
model.set_gradient_checkpointing(**plan.checkpointing)
model.train()
optimizer = build_optimizer(list(plan.entries), plan.setting, context.device)
step = GradientStep(
    model, plan.objective, micro_batch_size=micro_batch_size(context, plan, model, []),
    autocast=context.autocast, backward=lambda loss: loss.backward(),
)
numbers = torch.arange(plan.share)
batch = blank_pairs(plan, model, plan.share, 12) | {"image_keys": numbers, "text_keys": numbers}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = now("VmRSS")
for _ in range(2):
    step(batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(said / (now("VmHWM") - before))
"""


@on_a_cpu
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not tell a peak")
@pytest.mark.parametrize("checkpointing", ["none", pytest.param("both", marks=pytest.mark.slow)])
def test_the_estimate_is_what_a_process_takes(stores, checkpointing):
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(stores), checkpointing],
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # the command, where a test has called it, sets PYTHONSAFEPATH
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert 0.7 < float(done.stdout.splitlines()[-1]) < 1.4
