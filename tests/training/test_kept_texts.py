"""Features of a text tower that stays as it is: computed once, the same steps as without them, kept where they pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cnclip_ft.features import text_features
from cnclip_ft.features.text_features import PairTexts, TextFeatures
from cnclip_ft.recipe import Recipe
from cnclip_ft.training.memory import bytes_per_pair
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from cnclip_ft.training.stop import Stopped, StopRequest
from cnclip_ft.training.throughput import flops_per_pair
from cnclip_ft.training.trainer import Trainer
from data_tools.errors import UserError
from data_tools.store import open_store
from tests.training.helpers import losses, one_stage, planned, prepared, stopped_after, tiny_model, write_several
from tests.training.test_processes import MODEL, two_train_as_one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_several(tmp_path_factory.mktemp("kept"))


PROJECTION = [
    {"tower": "image", "rate": 1},
    {"tower": "text", "part": "projection", "rate": 1},
    {"tower": "text", "part": "rest", "rate": 0},
    {"tower": "temperature", "rate": 1},
]


def recipe_of(place, folder, **stage) -> Recipe:
    return one_stage(place, folder, {"train": "image", "batch_size": 8} | stage, model=MODEL)


@pytest.mark.parametrize("stage", [{}, {"captions_at_once": 3}, {"captions_at_once": 3, "micro_batch_size": 3}])
def test_steps_are_those_of_texts_read_every_time(place, tmp_path, stage):
    assert train(recipe_of(place, tmp_path / "kept", **stage))
    assert train(recipe_of(place, tmp_path / "read", feature_cache=False, **stage))
    found, wanted = losses(tmp_path / "kept"), losses(tmp_path / "read")
    assert found.keys() == wanted.keys() and len(found) == 6
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=2e-5)
    assert len(set(wanted.values())) == 6  # something is learnt
    assert list((tmp_path / "kept/cache").glob("texts-*")) and not list((tmp_path / "read").glob("cache/texts-*"))


def test_no_step_reads_a_text(place, tmp_path, monkeypatch):
    trainer = prepared(recipe_of(place, tmp_path / "run", captions_at_once=3), 0)
    monkeypatch.setattr(trainer.whole.text_tower, "forward", lambda *given, **more: pytest.fail("a text was read"))
    for batch, _ in zip(trainer.batches(), range(3), strict=False):
        trainer.take(batch)
    trainer.settle()
    assert trainer.settled[-1].loss > 0


def test_rows_are_what_the_tower_says(place, tmp_path):
    context, model, _ = planned(recipe_of(place, tmp_path / "run"))
    store, pairs = open_store(place / "train"), np.array([[5, 0], [7, 5]])
    texts = PairTexts(tmp_path, model, store, "fp32")
    assert texts.build(context.accelerator, context.autocast, lambda: False)
    model.eval()
    for row, column in np.ndindex(pairs.shape):
        ids, mask = model.tokenizer.pad(model.tokenizer.encode([store[int(pairs[row, column])].text]))
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask)[1][0]
        torch.testing.assert_close(texts.rows(pairs)[row, column], wanted, atol=1e-5, rtol=1e-5)


def test_kept_rows_of_another_width_are_told(place, tmp_path):
    context, model, _ = planned(recipe_of(place, tmp_path / "run"))
    texts = PairTexts(tmp_path, model, open_store(place / "train"), "fp32")
    asked = (context.accelerator, context.autocast, lambda: False)
    assert texts.build(*asked)
    file = texts.features.folder / "features.npy"
    np.save(file, np.load(file)[:, 1:])
    with pytest.raises(
        UserError, match=rf"{file} cannot be used \(it holds float32 \[48, 15\], expected float32 \[48, 16\]"
    ):
        texts.build(*asked)


def test_damaged_rows_are_named(place, tmp_path):
    trainer = prepared(recipe_of(place, tmp_path / "run"), 0)
    file = trainer.prepared.texts.features.folder / "features.npy"
    array = np.load(file, mmap_mode="r+")
    array[:] = np.inf
    array.flush()
    trainer.take(next(trainer.batches()))
    with pytest.raises(UserError, match=rf"step 1: the loss is nan. {file} is damaged: 48 of 48 rows"):
        trainer.settle()


def test_a_run_goes_on_exactly_and_a_later_one_reads_them(place, tmp_path, capsys):
    def recipe(name):
        shared = {"feature_cache": str(tmp_path / "cache")}
        return recipe_of(place, tmp_path / name, captions_at_once=3).model_copy(update=shared)

    assert train(recipe("whole"))
    assert "Text features of the frozen tower: computed once into" in capsys.readouterr().out
    assert not train(recipe("stopped"), **stopped_after(("learn", 4)))
    assert train(recipe("stopped"), proceed=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    said = capsys.readouterr().out
    assert said.count("Text features of the frozen tower: read from") == 2 and "computed once into" not in said


def test_building_that_was_stopped_goes_on(place, tmp_path, monkeypatch):
    monkeypatch.setattr(text_features, "BLOCK", 8)
    context, model, plans = planned(recipe_of(place, tmp_path / "run"))
    stop, computed, encode = StopRequest(), [], text_features.encode_texts

    def one_block(model, texts):
        computed.append(len(texts))
        stop.ask()
        return encode(model, texts)

    monkeypatch.setattr(text_features, "encode_texts", one_block)
    with pytest.raises(Stopped):
        Trainer(context, plans[0], model, stop=stop)
    assert computed == [8]
    Trainer(context, plans[0], model)
    texts, _ = text_features.distinct_texts(open_store(place / "train"))
    assert sum(computed) == len(texts)


def test_another_tower_or_precision_has_its_own(tmp_path):
    def folder(**changes):
        given = {"digest": text_features.text_digest(tiny_model()), "width": 16, "precision": "fp32"} | changes
        return TextFeatures(tmp_path, ["一", "二"], **given).folder

    other = text_features.text_digest(tiny_model(seed=1))
    assert len({folder(), folder(digest=other), folder(precision="bf16"), folder(name="teacher")}) == 4


@pytest.mark.parametrize(
    "stage, kept",
    [
        ({}, True),
        ({"train": "both"}, False),
        ({"train": PROJECTION}, False),
        ({"feature_cache": False}, False),
        ({"negatives": {"swap": ["colour"]}}, False),
        ({"steps": 2, "validate_every": 2}, False),  # 16 texts are shown, 48 would be computed
        ({"steps": 2, "validate_every": 2, "captions_at_once": 4}, True),
    ],
)
def test_they_are_kept_where_nothing_of_the_tower_trains_and_it_pays(place, tmp_path, stage, kept):
    context, model, plans = planned(recipe_of(place, tmp_path / "run", **stage))
    assert plans[0].texts_kept == kept
    assert ("text tower frozen: its features are computed once" in describe(context, model, plans)) == kept


def test_the_plan_counts_without_them(place, tmp_path):
    context, model, plans = planned(recipe_of(place, tmp_path / "run", captions_at_once=3))
    read = replace(plans[0], texts_kept=False)
    assert bytes_per_pair(context, plans[0], model) < bytes_per_pair(context, read, model)
    assert flops_per_pair(plans[0], model, 12) < flops_per_pair(read, model, 12)


@pytest.mark.slow
def test_two_devices_train_as_one(place, tmp_path, one_thread):
    two_train_as_one(
        tmp_path, recipe_of(place, tmp_path / "one"), recipe_of(place, tmp_path / "two", captions_at_once=1)
    )
