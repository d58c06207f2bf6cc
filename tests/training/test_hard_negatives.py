"""Hard negatives: the loss against brute force, which texts a step shows, divided, shared out, continued, refused in words."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.data.mixture import Mixture, Part
from cnclip_ft.data.negatives import NegativeTexts
from cnclip_ft.data.pairs import build_table
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_data import Negatives
from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.hard_negatives import against_negatives
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.memory import blank_pairs, estimate
from cnclip_ft.training.optimizer import give_bias
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.negatives import mentioned
from data_tools.scenes import captions, sample_scenes
from data_tools.store import StoreWriter, open_store
from tests.training.helpers import losses, one_stage, planned, prepared, random_batch, stopped_after, tiny_model
from tests.training.test_processes import MODEL, two_train_as_one


@pytest.fixture(scope="module")
def place(stores, tmp_path_factory):
    """The pictures of `stores` under captions of drawn scenes, two each, in which everything can be swapped."""
    folder = tmp_path_factory.mktemp("told")
    for name, seed in (("train", 0), ("valid", 1)):
        shown = open_store(stores / name)
        with StoreWriter(folder / name) as writer:
            for image_id in shown.image_ids:
                writer.add_image(image_id, shown.image(image_id))
            for number, scene in enumerate(sample_scenes(len(shown.image_ids), seed=seed)):
                for at, (language, text) in enumerate(captions(scene, ("zh", "en"))):
                    writer.add_pair(shown.image_ids[number], 2 * number + at, text, language)
            writer.finish()
    save_checkpoint(tiny_model(dropout=0.0, seed=7).eval(), folder / "teacher", info={})
    return folder


def recipe_of(place: Path, folder: Path, *, negatives=None, stage=None, **changes) -> Recipe:
    return one_stage(
        place, folder, {"negatives": {"count": 3, **(negatives or {})}} | (stage or {}), **({"model": MODEL} | changes)
    )


def texts_of(place: Path, seed: int = 0, **setting) -> NegativeTexts:
    store, tokenizer = open_store(place / "train"), tiny_model().tokenizer
    return NegativeTexts(store, build_table(store, tokenizer), tokenizer, Negatives(**setting), seed, "here")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=-1).requires_grad_()


@pytest.mark.parametrize("objective", [ContrastiveObjective, SigmoidObjective])
@pytest.mark.parametrize("dimensions", [(), (4, 2)])
def test_the_loss_is_what_is_written_down(objective, dimensions):
    """One picture after another, over the negatives that are there."""
    n, count = 7, 3
    x, y = unit(n, 6), unit(n, 1 + count, 6, seed=1)
    present = torch.rand(n, count, generator=torch.Generator().manual_seed(2)) < 0.6
    present[0], present[1] = False, True
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    for width in (6, *dimensions):
        a, b = (each if width == 6 else F.normalize(each[..., :width], dim=-1) for each in (x, y))
        for row in range(n):
            there = b[row][[True, *present[row].tolist()]]
            z = scale.exp() * there @ a[row]
            if objective is ContrastiveObjective:
                expected = expected + F.cross_entropy(z[None], torch.tensor([0])) / n
            else:
                expected = expected - F.logsigmoid(-(z[1:] + bias)).sum() / n
    expected = expected / (1 + len(dimensions))
    found = against_negatives(objective(dimensions=dimensions), x, y, present, scale, bias)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    inputs = (x, y, scale) if objective is ContrastiveObjective else (x, y, scale, bias)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_none_at_all_count_nothing():
    x, y = unit(4, 6), unit(4, 3, 6, seed=1)
    loss = against_negatives(ContrastiveObjective(), x, y, torch.zeros(4, 2, dtype=torch.bool), torch.tensor(4.6))
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("objective", [ContrastiveObjective(dimensions=(8,)), SigmoidObjective()])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_a_divided_batch_has_the_gradient_of_the_whole(objective, micro):
    model = tiny_model(dropout=0.0).double()
    give_bias(model, objective)
    batch = random_batch(model, 8)
    others = random_batch(model, 16, seed=4)
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.cat([batch[name][:, None], others[name].unflatten(0, (8, 2))], 1)
    batch["negatives"] = torch.tensor([[True, False], [True, True], [False, False], [False, True]] * 2)

    def gradients(size):
        model.zero_grad()
        step = GradientStep(
            model, objective, micro_batch_size=size, autocast=nullcontext, backward=torch.Tensor.backward, negatives=0.7
        )
        out = step(dict(batch))
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (whole, expected), (parts, found) = gradients(None), gradients(micro)
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
    images, texts = model(batch["pixels"], batch["input_ids"][:, 0], batch["attention_mask"][:, 0])
    plain = objective(images, texts, model.logit_scale, batch["image_keys"], batch["text_keys"], model.logit_bias)
    _, all_texts = model(
        input_ids=batch["input_ids"].flatten(0, 1), attention_mask=batch["attention_mask"].flatten(0, 1)
    )
    hard = against_negatives(
        objective, images, all_texts.unflatten(0, (8, 3)), batch["negatives"], model.logit_scale, model.logit_bias
    )
    torch.testing.assert_close(whole.loss, (plain.loss + 0.7 * hard).detach(), atol=1e-12, rtol=0)
    assert whole.accuracy == plain.accuracy  # of the pairs among themselves


def test_a_step_shows_each_picture_what_is_not_true_of_it(place):
    texts = texts_of(place, count=3)
    pairs = [7, 0, 21]
    batch = texts.batch(np.array(pairs)[:, None], 5)
    assert batch["input_ids"].shape[:2] == (3, 4) and batch["negatives"].all()
    for row, pair in enumerate(pairs):
        said = [texts.tokenizer.encode([text])[0] for text in (texts.store[pair].text, *texts.texts(pair, 5))]
        for ids, mask, tokens in zip(batch["input_ids"][row], batch["attention_mask"][row], said, strict=True):
            assert ids[mask.bool()].tolist() == tokens
    again = texts_of(place, count=3)
    assert torch.equal(
        again.batch(np.array([[0]]), 5)["input_ids"][0],
        batch["input_ids"][1][:, : again.batch(np.array([[0]]), 5)["input_ids"].shape[2]],
    )
    assert texts.texts(0, 5) != texts.texts(0, 6) and texts.texts(0, 5) != texts_of(place, seed=1, count=3).texts(0, 5)
    assert texts.batch(np.array(pairs)[:, None], 5, lengths=(16, 48))["input_ids"].shape[2] in (16, 48)


def test_a_negative_that_a_caption_of_the_picture_says_is_left_out(place, monkeypatch):
    texts = texts_of(place, count=4)
    pair = 6
    image = texts.store[pair].image_id
    other = next(each.text for n, each in enumerate(texts.store.pairs()) if each.image_id == image and n != pair)
    monkeypatch.setattr(NegativeTexts, "texts", lambda self, pair, step: [other, "红", "红", self.store[pair].text])
    batch = texts.batch(np.array([[pair]]), 0)
    assert batch["negatives"].tolist() == [[True, False, False, False]]
    assert batch["input_ids"][0, 1][batch["attention_mask"][0, 1].bool()].tolist() == texts.tokenizer.encode(["红"])[0]
    assert torch.equal(batch["input_ids"][0, 0], batch["input_ids"][0, 3])  # what stands where there is none


@pytest.mark.parametrize("mixed", [False, True])
def test_negatives_of_the_store_and_swapped_ones_take_turns(place, tmp_path, mixed):
    old = open_store(place / "train")
    with StoreWriter(tmp_path / "kept") as writer:
        for image_id in old.image_ids:
            writer.add_image(image_id, old.image(image_id))
        for number, pair in enumerate(old.pairs()):
            own = {"negatives": ["一只猫", "a dog"]} if number % 2 else None
            writer.add_pair(pair.image_id, pair.text_id, pair.text, pair.language, beside=own)
        writer.finish()
    store, tokenizer = open_store(tmp_path / "kept"), tiny_model().tokenizer
    if mixed:
        store = Mixture([Part(old), Part(store)])
    texts = NegativeTexts(store, build_table(store, tokenizer), tokenizer, Negatives(count=3), 0, "here")
    assert texts.kept == 20
    first = 40 if mixed else 0
    assert not {"一只猫", "a dog"} & set(texts.texts(first, 0))
    found = texts.texts(first + 1, 0)
    assert found[0] in ("一只猫", "a dog") and found[2] in ("一只猫", "a dog") and found[0] != found[2]
    assert found[1] not in ("一只猫", "a dog") and len(found) == 3
    alone = NegativeTexts(store, texts.table, tokenizer, Negatives(swap=[], count=3), 0, "here")
    assert sorted(alone.texts(first + 1, 0)) == ["a dog", "一只猫"] and alone.texts(first, 0) == []
    assert alone.batch(np.array([[first], [first + 1]]), 0)["negatives"].tolist() == [[False] * 3, [True, True, False]]
    passed = NegativeTexts(store, texts.table, tokenizer, Negatives(kept=False, count=3), 0, "here")
    assert passed.kept == 0 and not {"一只猫", "a dog"} & set(passed.texts(first + 1, 0))


def test_what_is_swapped_in_is_said_in_other_captions(place):
    texts = texts_of(place, swap=["colour", "object"], count=64)
    said = set().union(*(mentioned(pair.text) for pair in texts.store.pairs()))
    for pair in range(40):
        assert texts.texts(pair, 0) and all(mentioned(text) <= said for text in texts.texts(pair, 0))
    assert texts.shares == {"colour": 1.0, "object": 1.0} and texts.share == 1.0


def test_a_run_learns_to_tell_them_apart_and_goes_on_exactly(place, tmp_path):
    """Of cached features, beside a teacher, over two widths: each alone is one of the tests above."""
    changes = {
        "negatives": {"weight": 2.0},
        "stage": {
            "steps": 12, "validate_every": 12, "learning_rate": 3e-3, "train": "text", "objective": {"dimensions": [8]},
            "distill": {"teacher": str(place / "teacher"), "features": 0.1},
        },
    }  # fmt: skip
    assert train(recipe_of(place, tmp_path / "whole", **changes))
    found = losses(tmp_path / "whole")
    assert not train(recipe_of(place, tmp_path / "stopped", **changes), **stopped_after(("learn", 7)))
    assert train(recipe_of(place, tmp_path / "stopped", **changes), proceed=True)
    assert losses(tmp_path / "stopped") == found
    changes["stage"] |= {"micro_batch_size": 3}
    assert train(recipe_of(place, tmp_path / "parts", **changes))
    parts = losses(tmp_path / "parts")
    assert all(parts["learn", step] == pytest.approx(found["learn", step], abs=2e-4) for step in range(1, 13))


def test_training_against_them_makes_their_loss_small(place, tmp_path):
    trainer = prepared(
        recipe_of(
            place,
            tmp_path / "run",
            negatives={"weight": 4.0},
            stage={"steps": 60, "learning_rate": 5e-3, "warmup_steps": 5},
        ),
        0,
    )
    texts = trainer.plan.negatives
    batch = texts.batch(np.arange(0, 40, 2)[:, None], 10**6)  # drawn for no step
    pictures = np.stack([trainer.whole.image_tower.preprocessing.decode(texts.store.image(texts.store[n].image_id)) for n in range(0, 40, 2)])  # fmt: skip

    def loss():
        with torch.no_grad():
            images = trainer.model.image_features(torch.from_numpy(pictures))
            said = trainer.model.text_features(batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1))
            scale = trainer.model.logit_scale
            return against_negatives(
                trainer.plan.objective, images, said.unflatten(0, (20, 4)), batch["negatives"], scale
            )

    before = loss()
    for each in trainer.batches():
        trainer.take(each)
    assert loss() < 0.8 * before


@pytest.mark.slow
def test_two_devices_train_as_one(place, tmp_path, one_thread):
    two_train_as_one(
        tmp_path, recipe_of(place, tmp_path / "one"), recipe_of(place, tmp_path / "two", stage={"micro_batch_size": 3})
    )


def test_the_plan_and_the_memory_know_them(place, tmp_path):
    context, model, plans = planned(recipe_of(place, tmp_path / "run", negatives={"weight": 0.5}))
    said = describe(context, model, plans)
    assert (
        "hard negatives: 0.5 · loss against up to 3 texts a pair that are not true, 4 texts a pair go through" in said
    )
    assert "something can be swapped in 100% of the captions (colour 100%, number" in said
    assert "    0 pairs keep negatives" in said
    assert len(blank_pairs(plans[0], model, 2, 9)["input_ids"]) == 8
    plain = planned(recipe_of(place, tmp_path / "run", stage={"negatives": None}))
    assert estimate(context, plans[0], model).activations > estimate(*plain[:1], plain[2][0], plain[1]).activations


def test_captions_without_anything_to_swap_are_refused_in_words(stores, tmp_path):
    with pytest.raises(RequestError, match=r"stages.learn.negatives: in none of 40 captions of .* \(position\)"):
        planned(recipe_of(stores, tmp_path / "run", negatives={"swap": ["position"]}))
    with pytest.raises(
        RequestError, match=r"stages.learn.negatives: none of the 40 pairs of .* keeps negatives.*column negatives"
    ):
        planned(recipe_of(stores, tmp_path / "run", negatives={"swap": []}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stages.learn.kind=teach", "stages.learn.teach={teacher: t, texts: p}"], "stages.learn.negatives=null"),
        (["stages.learn.negatives.swap=[]", "stages.learn.negatives.kept=false"], "stages.learn.negatives.kept=true"),
        (["stages.learn.negatives.swap=[size]"], "stages.learn.negatives.swap"),
        (["stages.learn.negatives.swap=[colour, colour]"], r"stages.learn.negatives.swap=\[colour\]"),
        (["stages.learn.negatives.count=0"], "stages.learn.negatives.count"),
        (["stages.learn.negatives.weight=0"], "stages.learn.negatives.weight"),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(place, tmp_path, changes, said):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(place, tmp_path / "run")), encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        load_recipe(str(tmp_path / "recipe.yaml"), changes)
