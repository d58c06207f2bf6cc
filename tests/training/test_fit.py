"""`micro_batch_size: auto`: the largest share of a batch that fits, tried with what training does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cnclip_ft.training import fit
from cnclip_ft.training.run import Run
from tests.training.helpers import tiny_recipe


@pytest.fixture
def stage(stores):
    recipe = tiny_recipe(stores, output=str(stores / "fit"), align={"feature_cache": False})
    stage = Run(recipe, write=False).stages[1]
    stage.selection.keep_start = lambda: None  # nothing was judged
    stage.prepare()
    return stage


@pytest.mark.parametrize("room,expected", [(8, None), (7, 4), (4, 4), (3, 2), (1, 1), (0, 1)])
def test_halves_until_it_fits(stage, monkeypatch, room, expected):
    tried = []
    stage.model.register_buffer("running_mean", torch.zeros(2))

    def limited(_stage, size):
        tried.append(size)
        stage.model.running_mean += 1
        if size > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit, "_try", limited)
    monkeypatch.setattr(stage.run, "device", SimpleNamespace(type="cuda"))  # the batch has 8 pairs
    assert fit.largest_that_fits(stage) == expected
    assert tried == sorted(tried, reverse=True) and tried[0] == 8
    assert not stage.model.running_mean.any()  # blank pictures teach batch norm nothing


def test_a_trial_is_a_whole_forward_and_backward(stage):
    fit._try(stage, 3)
    grads = [parameter.grad for parameter in stage.model.parameters() if parameter.grad is not None]
    assert len(grads) > 20 and all(torch.isfinite(grad).all() for grad in grads)


def test_a_cpu_has_no_limit_to_run_into(stage, monkeypatch):
    monkeypatch.setattr(fit, "_try", None)
    assert fit.largest_that_fits(stage) is None
