"""Workers by a measured rate: what is chosen, what is said, and a run whose loader is replaced in its middle."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import active_children

import pytest

from cnclip_ft.training import run as run_module
from cnclip_ft.training.run import train
from cnclip_ft.training.sizing import Sizing
from tests.training.helpers import losses, records, tiny_recipe, write_stores


def sized(of_worker: float, of_step: float, workers: int = 2, most: int = 12) -> Sizing:
    sizing = Sizing(workers, most, pairs=100)
    for _ in range(3):
        sizing.add(30.0, 60.0)  # the first ones say nothing
    for extra in (0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 9.0, 0.0):
        assert not sizing.at_rest
        sizing.add(of_worker + extra, of_step + extra)
    assert sizing.at_rest
    return sizing


@pytest.mark.parametrize(
    "of_worker,of_step,most,needed,chosen,bound",
    [
        (1.0, 0.2, 12, 7, 7, False),  # five are as fast, and a quarter more
        (0.1, 0.5, 12, 1, 2, False),  # fewer are never taken than there are
        (4.0, 0.2, 12, 25, 12, True),
        (2.2, 0.2, 12, 14, 12, False),  # without the quarter they are fast enough
        (1.0, 0.2, 1, 7, 2, True),  # those that there are stay
    ],
)
def test_as_many_as_the_steps_need(of_worker, of_step, most, needed, chosen, bound):
    sizing = sized(of_worker, of_step, most=most)
    assert (sizing.needed, sizing.chosen, sizing.bound) == (needed, chosen, bound)
    numbers, said = sizing.numbers(), sizing.said()
    assert numbers["pictures_per_worker"] == pytest.approx(100 / of_worker)
    assert numbers["pairs_of_steps"] == pytest.approx(100 / of_step)
    assert said.startswith(f"data.workers: auto → {chosen}: one decodes {100 / of_worker:,.0f} pictures a second")
    assert (f"The loader is the bound: {needed} would be needed, and there are cores for {chosen}" in said) is bound


@pytest.mark.slow
def test_a_loader_that_is_replaced_brings_the_same_batches(tmp_path, monkeypatch):
    stores = write_stores(tmp_path)
    whole = run_module.make_context

    def slow(recipe, **options):
        """A machine with three cores to spare, whose workers look slow."""
        context, model = whole(recipe, **options)
        return replace(context, workers=1, most_workers=3), model

    def recipe(name, workers):
        data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": workers}
        stage = {"steps": 14, "validate_every": 14}
        return tiny_recipe(
            stores,
            output=str(tmp_path / name),
            data=data,
            align=stage | {"steps": 1, "warmup_steps": 0},
            contrast=stage,
        )

    assert train(recipe("given", 0))
    monkeypatch.setattr(run_module, "make_context", slow)
    monkeypatch.setattr(Sizing, "needed", property(lambda sizing: 2))
    decoding = {}  # processes, by the place of a step
    assert train(
        recipe("measured", "auto"),
        before_step=lambda trainer: decoding.update({(trainer.plan.name, trainer.step): len(active_children())}),
    )
    # None where features are cached; one until the steps of the second stage are measured, then two.
    assert list(decoding.values()) == [0] + 11 * [1] + 3 * [2]
    assert losses(tmp_path / "measured") == losses(tmp_path / "given")
    (told,) = records(tmp_path / "measured", "loader")
    assert (told["stage"], told["step"], told["workers_before"], told["workers"]) == ("contrast", 11, 1, 2)
    assert not records(tmp_path / "given", "loader")
