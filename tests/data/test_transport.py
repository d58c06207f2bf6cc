"""Pictures through shared blocks: the same pixels as without workers, blocks used again only when nobody looks at them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.data.batching import BatchOrder, StageSampler, make_loader
from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.data.transport import BLOCK, SECONDS, Collate, SharedBlocks
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.store import StoreWriter, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "train"
    with StoreWriter(folder) as writer:
        for number in range(24):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            writer.add_image(number, file.getvalue())
            writer.add_pair(number, number, f"图片{number}", "zh")
        writer.finish()
    return open_store(folder)


def loader(store, workers, steps):
    tokenizer = TextTokenizer()
    table = build_table(store, tokenizer)
    sampler = StageSampler(BatchOrder(table, 4, seed=0), 0, steps, 0, 1)
    return make_loader(PairDataset(store, table, SquarePicture(32)), sampler, tokenizer, workers, pin=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_bring_the_same_batches(store, workers):
    steps = 40  # many times as many batches as blocks
    alone = list(loader(store, 0, steps))
    brought = loader(store, workers, steps)
    assert brought.blocks.shape == (workers * 6, 4, 32, 32, 3)
    for expected, batch in zip(alone, brought, strict=True):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            if name == SECONDS:
                assert 0 < batch[name] < 60
            else:
                assert torch.equal(batch[name], value) if name != "faults" else batch[name] == value
    del batch
    assert not brought.blocks.taken.any()


def test_what_is_kept_is_not_written_over(store):
    steps = 40  # all kept at once: when the blocks are in use, pictures come in memory of their own
    alone = [batch["pixels"].clone() for batch in loader(store, 0, steps)]
    brought = loader(store, 1, steps)
    rows = [batch["pixels"][1:3] for batch in brought]  # a part keeps its block too
    assert brought.blocks.taken.all()
    assert all(torch.equal(row, expected[1:3]) for row, expected in zip(rows, alone, strict=True))
    del rows
    assert not brought.blocks.taken.any()


def test_blocks_belong_to_workers_and_may_be_filled_in_part(monkeypatch):
    class Worker:
        id, num_workers = 1, 2

    monkeypatch.setattr("cnclip_ft.data.transport.get_worker_info", lambda: Worker)
    blocks = SharedBlocks(4, 2, (3, 3, 3))
    collate = Collate(blocks)
    picture = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    sample = {"pair": 7, "pixels": picture.permute(2, 0, 1), "fault": None}
    assert collate([sample])[BLOCK] == (1, 1)
    assert collate([sample, sample])[BLOCK] == (3, 2)
    third = collate([sample | {"fault": "image 5: not read"}])  # the other blocks belong to another worker
    assert BLOCK not in third and torch.equal(third["pixels"][0], sample["pixels"])
    assert third["pairs"].tolist() == [7] and third["faults"] == ["image 5: not read"]
    shown = blocks.take(1, 1, pin=False)
    assert torch.equal(shown, sample["pixels"][None])
    del shown
    assert blocks.taken.tolist() == [0, 0, 0, 1]
