"""`micro_batch_size: auto`: the largest share of a batch that fits, tried with what training does."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.training.fit import largest_half, largest_that_fits, try_step
from tests.training.helpers import planned, tiny_recipe


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


def test_a_cpu_has_no_limit_to_run_into(prepared):
    context, plan, model = prepared
    if context.device.type == "cpu":
        assert largest_that_fits(context, plan, model, []) is None
