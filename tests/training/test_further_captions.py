"""Several captions of a picture in one step: which ones, the loss against brute force, divided, shared out, continued, refused in words."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cnclip_ft.data.further_captions import FurtherCaptions
from cnclip_ft.data.negatives import NegativeTexts
from cnclip_ft.data.pairs import PairTable, build_table
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_data import Negatives
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.advice import warnings
from cnclip_ft.training.hard_negatives import against_negatives
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.memory import blank_pairs
from cnclip_ft.training.optimizer import give_bias
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import open_store
from tests.training.helpers import (
    losses,
    one_stage,
    planned,
    prepared,
    random_batch,
    stopped_after,
    tiny_model,
    write_several,
    write_store,
)
from tests.training.test_processes import MODEL, two_train_as_one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_several(tmp_path_factory.mktemp("several"))


def recipe_of(place, folder, *, stage=None, **changes) -> Recipe:
    return one_stage(place, folder, {"captions_at_once": 3} | (stage or {}), **({"model": MODEL} | changes))


def captions_of(images: list[int], count: int, *, seed: int = 0, weights: list[float] | None = None) -> FurtherCaptions:
    none = np.arange(len(images) + 1)
    weighed = None if weights is None else np.array(weights)
    table = PairTable(np.array(images), none[:-1], none[:0], none * 0, cut=0, weights=weighed)
    return FurtherCaptions(table, count, seed, "stages.learn.captions_at_once")


def test_each_pair_brings_its_own_and_others_of_its_picture():
    images = [3, 0, 3, 3, 0, 7, 3, 0]
    found = captions_of(images, 3).draw(np.arange(8), 5)
    assert found.shape == (8, 3) and (found[:, 0] == np.arange(8)).all()
    assert (np.array(images)[found] == np.array(images)[:, None]).all()
    for pair in (0, 1, 2, 3, 4, 6, 7):
        assert len(set(found[pair].tolist())) == 3
    assert found[5].tolist() == [5, 5, 5]  # it has no other
    assert captions_of([0, 0, 1], 4).draw(np.array([1]), 0).tolist() == [[1, 0, 1, 0]]


def test_they_are_a_function_of_seed_step_and_pair_alone():
    images = np.repeat(np.arange(20), 6).tolist()
    several, pairs = captions_of(images, 3), np.random.default_rng(0).permutation(120)[:50]
    whole = several.draw(pairs, 9)
    for rank in range(3):
        assert np.array_equal(captions_of(images, 3).draw(pairs[rank::3], 9), whole[rank::3])
    assert not np.array_equal(several.draw(pairs, 10), whole)
    assert not np.array_equal(captions_of(images, 3, seed=1).draw(pairs, 9), whole)


def test_of_very_many_captions_some_are_looked_at():
    several = captions_of([0] * 3000 + [1] * 4, 3)
    pairs = np.array([0, 1500, 2999, 3001])
    found = np.stack([several.draw(pairs, step) for step in range(600)])
    assert (found[:, :, 0] == pairs).all() and (found[:, :3] < 3000).all() and (found[:, 3] >= 3000).all()
    assert all(len(set(row)) == 3 for each in found for row in each.tolist())
    assert np.bincount(found[:, :3, 1:].ravel() // 500, minlength=6).min() > 500  # 600 of each sixth
    assert np.array_equal(several.draw(pairs[2:], 7), found[7][2:])


def test_a_caption_of_no_weight_is_drawn_last():
    several = captions_of([0] * 4, 3, weights=[1.0, 0.0, 1e-300, 2.0])
    drawn = np.concatenate([several.draw(np.zeros(1, dtype=np.int64), step) for step in range(50)])
    assert {frozenset(row) for row in drawn.tolist()} == {frozenset({0, 2, 3})} and (drawn[:, 1] == 3).all()


@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 2.0, 4.0, 3.0]])
def test_others_are_drawn_as_often_as_their_weights_say(weights):
    several = captions_of([0] * 5, 2, weights=weights)
    drawn = np.concatenate([several.draw(np.zeros(1, dtype=np.int64), step)[:, 1] for step in range(20_000)])
    shares = np.bincount(drawn, minlength=5) / len(drawn)
    wanted = np.array([0.0, *(weights or [1.0] * 5)[1:]])
    wanted /= wanted.sum()
    error = np.sqrt(wanted * (1 - wanted) / len(drawn))
    assert (np.abs(shares - wanted) <= 4 * error).all()


def batch_of(model, size: int, captions: int, more: int = 0) -> dict:
    """A batch whose pictures have several captions, some of them said of another picture too."""
    batch = random_batch(model, size)
    texts = random_batch(model, size * (captions + more), seed=4)
    for name in ("input_ids", "attention_mask"):
        batch[name] = texts[name].unflatten(0, (size, captions + more))
    batch["image_keys"] = torch.arange(size)
    batch["image_keys"][3] = 1
    batch["text_keys"] = torch.arange(size * captions).view(size, captions)
    batch["text_keys"][5, 1] = batch["text_keys"][2, 1]
    return batch


@pytest.mark.parametrize("objective", [ContrastiveObjective(dimensions=(8,)), SigmoidObjective()])
@pytest.mark.parametrize("negatives", [0.0, 0.7])
def test_the_loss_is_the_mean_over_batches_of_one_caption_each(objective, negatives):
    """Whole, and divided into micro-batches; beside hard negatives, which stand against the pair's own caption."""
    model = tiny_model(dropout=0.0).double()
    give_bias(model, objective)
    size, captions, more = 8, 3, 2 if negatives else 0
    batch = batch_of(model, size, captions, more)
    batch["negatives"] = torch.tensor([[True, False], [True, True], [False, False], [False, True]] * 2)

    def gradients(micro):
        model.zero_grad()
        step = GradientStep(
            model, objective, micro_batch_size=micro, autocast=nullcontext, backward=torch.Tensor.backward, negatives=negatives
        )  # fmt: skip
        out = step(dict(batch))
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    temperature = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
    outs, every = [], []
    for at in range(captions + more):
        images, texts = model(batch["pixels"], batch["input_ids"][:, at], batch["attention_mask"][:, at])
        every.append(texts)
        if at < captions:
            keys = {"image_keys": batch["image_keys"], "text_keys": batch["text_keys"][:, at]}
            outs.append(objective(images, texts, **keys, **temperature))
    expected = sum(out.loss for out in outs) / captions
    if negatives:
        told = torch.stack([every[0], *every[captions:]], 1)
        hard = against_negatives(objective, images, told, batch["negatives"], **temperature)
        expected = expected + negatives * hard
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for micro in (None, 3):
        out, found = gradients(micro)
        torch.testing.assert_close(out.loss, expected.detach(), atol=1e-12, rtol=0)
        assert float(out.accuracy.detach()) == pytest.approx(
            sum(float(each.accuracy.detach()) for each in outs) / captions
        )
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-6)


def test_a_step_shows_them(place, tmp_path):
    trainer = prepared(recipe_of(place, tmp_path / "run"), 0)
    seen, features_of = [], trainer.gradient._features
    trainer.gradient._features = lambda batch: seen.append(batch) or features_of(batch)
    batch = next(trainer.batches())
    trainer.take(batch)
    store, tokenizer = open_store(place / "train"), trainer.context.tokenizer
    shown = trainer.plan.further.draw(batch["pairs"].numpy(), 0)
    assert seen[0]["input_ids"].shape[:2] == (8, 3) and len(seen[0]["pixels"]) == 8
    for row, pairs in enumerate(shown.tolist()):
        assert len({store[pair].image_id for pair in pairs}) == 1 and len(set(pairs)) == 3
        for at, pair in enumerate(pairs):
            ids = seen[0]["input_ids"][row, at][seen[0]["attention_mask"][row, at].bool()].tolist()
            assert ids == tokenizer.encode([store[pair].text])[0]
            assert seen[0]["text_keys"][row, at] == trainer.context.pairs.text_keys[pair]


def test_negatives_stand_behind_all_captions(place):
    store, tokenizer = open_store(place / "train"), tiny_model().tokenizer
    table = build_table(store, tokenizer)
    texts = NegativeTexts(store, table, tokenizer, Negatives(swap=["colour", "object"], count=2), 0, "here")
    captions = FurtherCaptions(table, 3, 0, "here").draw(np.array([0, 7]), 0)
    batch = texts.batch(captions, 0)
    alone = texts.batch(captions[:, :1], 0)
    assert batch["input_ids"].shape[:2] == (2, 5) and torch.equal(batch["negatives"], alone["negatives"])
    shown = [tokenizer.encode([store[pair].text])[0] for pair in captions.ravel().tolist()]
    for place_of, wanted in enumerate(shown):
        row, at = divmod(place_of, 3)
        assert batch["input_ids"][row, at][batch["attention_mask"][row, at].bool()].tolist() == wanted
    for row in range(2):
        for at in range(2):
            one, other = batch["attention_mask"][row, 3 + at].bool(), alone["attention_mask"][row, 1 + at].bool()
            assert torch.equal(batch["input_ids"][row, 3 + at][one], alone["input_ids"][row, 1 + at][other])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_goes_on_exactly(place, tmp_path, frozen):
    stage = {"train": "text" if frozen else "both", "objective": {"label_smoothing": 0.1}}
    assert train(recipe_of(place, tmp_path / "whole", stage=stage))
    found = losses(tmp_path / "whole")
    assert not train(recipe_of(place, tmp_path / "stopped", stage=stage), **stopped_after(("learn", 4)))
    assert train(recipe_of(place, tmp_path / "stopped", stage=stage), proceed=True)
    assert losses(tmp_path / "stopped") == found
    assert train(recipe_of(place, tmp_path / "plain", stage=stage | {"captions_at_once": 1}))
    assert losses(tmp_path / "plain") != found


@pytest.mark.slow
def test_two_devices_train_as_one(place, tmp_path, one_thread):
    two_train_as_one(
        tmp_path, recipe_of(place, tmp_path / "one"), recipe_of(place, tmp_path / "two", stage={"micro_batch_size": 3})
    )


def test_the_plan_and_the_memory_know_them(place, tmp_path):
    context, model, plans = planned(recipe_of(place, tmp_path / "run", stage={"negatives": {"count": 2}}))
    said = describe(context, model, plans)
    assert "each pair brings 3 captions of its picture into a step, its own first (a picture has 4 on average)" in said
    assert len(blank_pairs(plans[0], model, 2, 9)["input_ids"]) == 10
    assert "5 texts a pair go through the text tower" in said


@pytest.mark.parametrize("count", [4, 5])
def test_more_captions_than_any_picture_has_are_told(place, tmp_path, count):
    context, model, plans = planned(recipe_of(place, tmp_path / "run", stage={"captions_at_once": count}))
    told = [line for line in warnings(context, model, plans) if "captions_at_once" in line]
    assert len(told) == (count > 4) and all("captions_at_once=4" in line for line in told)


def test_pictures_with_one_caption_are_refused_in_words(tmp_path):
    for name in ("train", "valid"):
        write_store(tmp_path / name, images=12, captions=1, seed=0)
    with pytest.raises(RequestError, match=r"captions_at_once=3: none of the .* second caption.*captions_at_once=1"):
        planned(recipe_of(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stages.learn.kind=teach", "stages.learn.teach={teacher: t, texts: p}"], "stages.learn.captions_at_once=1"),
        (["stages.learn.kind=ground", "stages.learn.train=heads"], "stages.learn.captions_at_once=1"),
        (["stages.learn.distill={teacher: t}"], "stages.learn.captions_at_once=1, or stages.learn.distill=null"),
        (["stages.learn.captions_at_once=0"], "stages.learn.captions_at_once"),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(place, tmp_path, changes, said):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(place, tmp_path / "run")), encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        load_recipe(str(tmp_path / "recipe.yaml"), changes)
