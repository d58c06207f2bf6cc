"""Pairs as training reads them: pictures decoded as the recipe asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnclip_ft.data.images import decode
from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.data.texts import TextTokenizer
from cnclip_ft.models.start import build_start
from cnclip_ft.recipe import Augmentation
from cnclip_ft.training.feature_cache import cache_key
from data_tools.store import StoreWriter, open_store
from tests.data.test_images import encoded, picture
from tests.models.helpers import VIT


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.add_image(1, encoded(picture(400, 300), "JPEG", quality=95))
        writer.add_pair(1, 1, "一只狗", None)
        writer.finish()
    return open_store(tmp_path / "store")


def test_whole_decoding_on_request(store):
    table = build_table(store, TextTokenizer(context_length=12))
    whole = PairDataset(store, table, 32, reduced=False)[0]["pixels"]
    assert torch.equal(whole, decode(store.image(1), 32))
    assert torch.equal(PairDataset(store, table, 32)[0]["pixels"], decode(store.image(1), 32, reduced=True))
    assert not torch.equal(whole, PairDataset(store, table, 32)[0]["pixels"])


def test_features_of_reduced_pictures_are_others(store):
    model = build_start(VIT)[0]
    keys = {cache_key(model, store, 1, Augmentation(), "fp32", 0, reduced) for reduced in (True, False)}
    assert len(keys) == 2


def test_texts_of_a_batch_are_padded_to_its_longest(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        for number, text in enumerate(["一只狗在雪地里跑", "猫", "两只狗", "猫"]):
            writer.add_image(number, encoded(picture(40, 30), "JPEG"))
            writer.add_pair(number, number, text, None)
        writer.finish()
    tokenizer = TextTokenizer(context_length=9)
    table = build_table(open_store(tmp_path / "store"), tokenizer)
    for pairs in ([3, 0, 2], [1], [2, 1], [3, 1]):
        batch = table.batch(np.array(pairs), tokenizer)
        texts = [["一只狗在雪地里跑", "猫", "两只狗", "猫"][pair] for pair in pairs]
        expected = tokenizer.encode(texts)
        longest = max(map(len, expected))
        assert batch["input_ids"].tolist() == [ids + [0] * (longest - len(ids)) for ids in expected]
        assert batch["attention_mask"].tolist() == [[1] * len(ids) + [0] * (longest - len(ids)) for ids in expected]
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert batch["image_keys"].tolist() == pairs
    assert batch["text_keys"][0] == batch["text_keys"][1]  # the same caption twice
