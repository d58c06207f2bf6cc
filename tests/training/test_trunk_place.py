"""Where features stand for the image trunk it does not lie on the device: steps and validations do without, checkpoints are whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnclip_ft.features import shared_encoder
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training import validation
from cnclip_ft.training.memory import blank_pairs, estimate
from cnclip_ft.training.run import train
from cnclip_ft.training.trainer import Trainer
from cnclip_ft.training.validation import Judge
from data_tools.store import open_store
from tests.training.helpers import planned, stopped_after, tiny_model, tiny_recipe, write_stores

NOWHERE = torch.device("meta")  # has shapes and no numbers: whoever computes with what lies there fails


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))


def recipe(stores, tmp_path, **changes):
    return tiny_recipe(stores, output=str(tmp_path / "run"), feature_cache=str(tmp_path / "cache"), **changes)


def test_steps_and_validations_do_without_it(stores, tmp_path, monkeypatch):
    """The trunk's numbers are gone when the first step is taken."""
    context, model, plans = planned(recipe(stores, tmp_path, align={"micro_batch_size": 4}))
    judge = Judge(context.evaluators, context.device, 0, context.autocast)
    monkeypatch.setattr(validation, "trunk_digest", lambda model: "the same")
    judge.trunk_is_frozen = True
    judge(model)  # as a run does it before its first step
    whole = DualEncoder.place_trunk
    monkeypatch.setattr(DualEncoder, "place_trunk", lambda model, device: whole(model, NOWHERE))
    trainer = Trainer(context, plans[0], model)
    assert plans[0].cached
    trunk = {name for name, p in model.named_parameters() if p.device == NOWHERE}
    assert trunk == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("image_tower.") and not model.image_tower.in_projection(name.removeprefix("image_tower."))
    }
    batches = trainer.batches()
    for _ in range(3):
        trainer.take(next(batches))
    with trainer.judged() as judged:
        found = judge(judged)
    twin = planned(recipe(stores, tmp_path))[1]
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if t.device != NOWHERE}, strict=False)
    right = Judge(context.evaluators, context.device, 0, context.autocast)(twin)
    assert found.scores == right.scores
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(p.device == context.device for p in held) and all(p.grad is None for p in model.trunk_parameters())
    assert {p.device for p in trainer.optimizer.state} == {context.device}


def test_it_comes_back_for_pictures_whose_features_are_not_kept(stores, monkeypatch):
    """And leaves again, also where the encoding fails."""
    model, places = tiny_model().eval(), []
    monkeypatch.setattr(DualEncoder, "place_trunk", lambda model, device: places.append(str(device)))
    monkeypatch.setattr(DualEncoder, "device", property(lambda model: NOWHERE))  # the trunk, on the CPU, is elsewhere
    monkeypatch.setattr(shared_encoder, "iterate_images", lambda model, ids, *_, **__: iter([torch.ones(len(ids), 32)]))
    monkeypatch.setattr(SharedEncoder, "_projected", lambda encoder, kept: kept)
    store = open_store(stores / "valid")
    encoder = SharedEncoder(model, trunk={})
    for _ in range(2):
        encoder.images("valid", store.image_ids, store.image)
        assert places == ["meta", "cpu"]  # the second time its features are there

    def fails(*_, **__):
        raise ArithmeticError

    monkeypatch.setattr(shared_encoder, "iterate_images", fails)
    with pytest.raises(ArithmeticError):
        encoder.images("another", store.image_ids, store.image)
    assert places == ["meta", "cpu"] * 2


def test_a_run_puts_it_away_once_a_stage_and_its_checkpoints_are_whole(stores, tmp_path, monkeypatch):
    places, whole = [], DualEncoder.place_trunk

    def place(model, device):
        places.append(str(device))
        whole(model, device)

    monkeypatch.setattr(DualEncoder, "place_trunk", place)
    assert not train(recipe(stores, tmp_path), **stopped_after(("align", 2)))
    assert places == ["cpu"]
    assert train(recipe(stores, tmp_path), proceed=True)
    assert places == ["cpu"] * 2  # not in the second stage, where both towers train
    kept = load(tmp_path / "run" / "align" / "best").state_dict()
    start = planned(recipe(stores, tmp_path))[1].state_dict()
    assert kept.keys() == start.keys()
    assert all(torch.equal(kept[name], start[name]) for name in start if name.startswith("image_tower."))


def test_the_memory_plan_leaves_it_out(stores, tmp_path):
    context, model, plans = planned(recipe(stores, tmp_path))
    card = replace(context, device=torch.device("cuda"))
    every = sum(p.numel() * 4 for p in model.parameters())
    trunk = sum(p.numel() * 4 for p in model.trunk_parameters())
    assert 0 < trunk < every
    assert estimate(card, plans[0], model).weights == every - trunk
    assert estimate(card, plans[1], model).weights == every
    assert estimate(context, plans[0], model).weights == every  # a CPU's memory is the host's


def test_a_size_is_tried_with_the_trunk_elsewhere(stores, tmp_path):
    _, model, plans = planned(recipe(stores, tmp_path))
    alone = blank_pairs(plans[0], model, 3, 5)["trunk"]
    assert alone.shape[0] == 3 and alone.device == model.device and alone.isfinite().all()
