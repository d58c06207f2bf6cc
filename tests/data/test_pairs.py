"""Pairs as training reads them: pictures decoded as the recipe asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.features.frozen_trunk import cache_key
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.start import build_start
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.runtime import from_workers
from data_tools.errors import UserError
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
    whole = PairDataset(store, table, SquarePicture(32), reduced=False)[0]["pixels"]
    assert torch.equal(whole, SquarePicture(32).decode(store.image(1)))
    assert torch.equal(
        PairDataset(store, table, SquarePicture(32))[0]["pixels"],
        SquarePicture(32).decode(store.image(1), reduced=True),
    )
    assert not torch.equal(whole, PairDataset(store, table, SquarePicture(32))[0]["pixels"])


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


def test_another_order_of_images_and_another_tower_have_other_features(tmp_path):
    keys = set()
    for name, options in {"plain": {}, "official": {"layout": "official"}, "shards": {"shard_size": 7}}.items():
        with StoreWriter(tmp_path / name, **options) as writer:
            for number in range(1, 12):  # 10 stands before 2 where ids are words
                writer.add_image(number, encoded(picture(40, 30), "JPEG"))
            writer.add_pair(1, 1, "猫")
            store = writer.finish()
        key = cache_key(build_start(VIT)[0], store, 1, Augmentation(), "fp32", 0, False)
        keys.add((store.checksum(), tuple(store.image_ids), key))
    assert len({checksum for checksum, _, _ in keys}) == 1
    assert len({key for _, _, key in keys}) == len({ids for _, ids, _ in keys}) == 2
    model = build_start(VIT)[0]
    model.image_tower.vision_model.config.hidden_act = "gelu"  # other features of equal weights
    assert cache_key(model, store, 1, Augmentation(), "fp32", 0, False) not in {key for _, _, key in keys}


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_refuse_a_store_that_was_replaced(tmp_path, start):
    def build(shift):
        with StoreWriter(tmp_path / "s", overwrite=True) as writer:
            for number in range(6):
                writer.add_image(number, encoded(picture(40, 30 + (number + shift) % 6), "JPEG"))
                writer.add_pair(number, number, f"第{number}张")
            return writer.finish()

    store = build(0)
    data = PairDataset(store, build_table(store, TextTokenizer(context_length=9)), SquarePicture(32))
    kept = [data[number]["pixels"] for number in range(6)]
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=start)
    batches = from_workers(loader)
    assert torch.equal(next(batches)["pixels"], kept[0])
    build(1).close()
    assert all(
        torch.equal(sample["pixels"], whole) for sample, whole in zip(batches, kept[1:], strict=True)
    )  # it has it open
    assert torch.equal(data[3]["pixels"], kept[3])
    with pytest.raises(UserError, match="replaced while it was being read") as caught:
        list(from_workers(DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)))
    assert "Traceback" not in str(caught.value)


def test_faults_of_workers_keep_their_words(tmp_path, store):
    (tmp_path / "store" / "pairs" / "data.mdb").unlink()
    data = PairDataset(store, build_table(store, TextTokenizer(context_length=9)), SquarePicture(32))
    with pytest.raises(UserError, match="cannot be opened any more") as caught:
        list(from_workers(DataLoader(data, batch_size=None, num_workers=1)))
    assert "Traceback" not in str(caught.value)


def test_a_caption_is_prepared_once(tmp_path, monkeypatch):
    """For its key and for its ids: two captions of one preparation are one text."""
    seen: list[str] = []
    prepare = TextTokenizer.prepare
    monkeypatch.setattr(TextTokenizer, "prepare", lambda self, text: seen.append(text) or prepare(self, text))
    captions = ["A Dog", "a dog", "一只狗"]
    with StoreWriter(tmp_path / "s") as writer:
        writer.add_image(0, encoded(picture(9, 9), "PNG"))
        for number, text in enumerate(captions):
            writer.add_pair(0, number, text, None)
        writer.finish()
    table = build_table(open_store(tmp_path / "s"), TextTokenizer(context_length=9))
    # All at once, a line each; once more where they are the same: that is compared, not believed.
    assert seen[0].split("\n") == captions and sorted(seen[1:]) == captions[:2] and len(set(table.text_keys)) == 2
    assert table.token_ids(0).tolist() == table.token_ids(1).tolist() == TextTokenizer().encode(["a dog"])[0]
