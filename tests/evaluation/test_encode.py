"""Features of a split: those of the model, in the right order, whoever computes them."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.features.encode import encode_split, encode_texts, evaluating, read_texts
from cnclip_ft.models.checkpoints import load
from data_tools.errors import DataFault, UserError
from data_tools.store import Pair, StoreWriter, open_store
from tests.evaluation import tiny


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


def test_a_split_is_read_once_with_all_its_pairs(store):
    split = read_texts(open_store(store))
    assert split.image_ids == list(range(100, 112))
    assert len(split.text_ids) == 25 and split.text_ids[-1] == 9000  # the lone text comes last
    assert len(split.positives) == 12 + 4 + 12
    assert split.languages.count("en") == 12
    belongs = {(split.image_ids[i], split.text_ids[t]) for i, t in split.positives.tolist()}
    assert {(100, 0), (101, 0), (100, 1)} <= belongs and (102, 0) not in belongs


def test_features_are_those_of_the_model_in_the_right_order(store, model):
    opened = open_store(store)
    features = encode_split(model, opened, batch_size=5)
    assert features.image_features.shape == (12, 32) and features.text_features.shape == (25, 32)
    pictures = model.encode_images([opened.image(i) for i in features.image_ids])
    assert torch.allclose(features.image_features, pictures, atol=1e-6)
    assert torch.allclose(features.text_features, model.encode_texts(features.texts), atol=1e-6)
    assert torch.allclose(features.text_features.norm(dim=1), torch.ones(25), atol=1e-6)
    assert features.seconds["images"] > 0


def test_workers_give_the_same(store, model):
    here = encode_split(model, open_store(store), batch_size=4)
    there = encode_split(model, open_store(store), batch_size=4, workers=2)
    assert torch.equal(here.image_features, there.image_features)


def test_every_modules_mode_is_restored(model):
    model.train()
    model.image_tower.eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_texts_that_read_the_same_get_the_very_same_feature(model):
    texts = ["猫", "一" * 9, *["狗" * n for n in range(1, 8)], "“红”", "一" * 9, "猫", '"红"']
    with evaluating(model):
        features = encode_texts(model, texts, batch_size=2)
    assert torch.equal(features[0], features[11]) and torch.equal(features[1], features[10])
    assert torch.equal(features[9], features[12])  # the same after preparation
    assert torch.allclose(features, model.encode_texts(texts), atol=1e-6)


def test_half_precision_runs_the_towers_in_it(store, model):
    full = encode_split(model, open_store(store))
    half = encode_split(model, open_store(store), dtype=torch.bfloat16)
    assert half.image_features.dtype == torch.float32
    assert not torch.equal(full.image_features, half.image_features)
    assert (full.image_features * half.image_features).sum(1).min() > 0.99


def test_a_split_without_answers_is_encoded_too(tmp_path, model):
    store = tiny.make_store(tmp_path / "test", images=3, answers=False, lone=4)
    features = encode_split(model, open_store(store))
    assert features.positives.shape == (0, 2) and len(features.text_ids) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, model, workers):
    with StoreWriter(tmp_path / "valid") as writer:
        writer.add_image(7, b"no image at all")
        writer.add_pair(7, 1, "猫")
        writer.finish()
    with pytest.raises(DataFault, match="image 7: no readable image"):
        encode_split(model, open_store(tmp_path / "valid"), workers=workers)


def test_a_text_id_with_two_texts_is_refused(store, monkeypatch):
    """Our writer refuses them; a store in the official layout can hold them."""
    opened = open_store(store)
    pairs = [Pair(100, 5, "文字一"), Pair(101, 5, "文字二")]
    monkeypatch.setattr(type(opened), "pairs", lambda _: iter(pairs))
    with pytest.raises(DataFault, match="text id 5 stands for '文字一' and for '文字二'"):
        read_texts(opened)


def test_a_pair_without_its_image_is_named(store, monkeypatch):
    opened = open_store(store)
    monkeypatch.setattr(type(opened), "pairs", lambda _: iter([Pair(77, 5, "文字")]))
    with pytest.raises(DataFault, match="text 5 names image 77"):
        read_texts(opened)


@pytest.mark.parametrize("side", ["image_tower.visual_projection", "text_tower.text_projection"])
def test_features_of_a_broken_model_are_never_given(store, checkpoint, side):
    broken = load(checkpoint)
    broken.get_submodule(side).weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"the {side.split('_')[0]} features hold NaN"):
        encode_split(broken, open_store(store))
