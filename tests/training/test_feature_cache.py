"""The frozen trunk's features: those of the trunk, in views, shared out, continued, and never another trunk's."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cnclip_ft.features import frozen_trunk as feature_cache
from cnclip_ft.features import rows as feature_rows
from cnclip_ft.features.frozen_trunk import FeatureCache
from cnclip_ft.features.rows import Rows
from cnclip_ft.recipe_stage import Augmentation
from data_tools.errors import UserError
from data_tools.store import open_store
from tests.training.helpers import tiny_model

ALONE = SimpleNamespace(
    device=torch.device("cpu"), is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None
)
CROPPED = Augmentation(crop=0.5)
ROUNDED = {"atol": 1e-5, "rtol": 0}  # MKL rounds by where a tensor lies in memory; features are about 1, missing ones 0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 4)  # 20 pictures: five blocks


def cache(folder, stores, *, model=None, **changes) -> FeatureCache:
    settings = {"views": 1, "augment": Augmentation(), "precision": "fp32", "seed": 0, "reduced": False} | changes
    return FeatureCache(folder, model or tiny_model().eval(), open_store(stores / "train"), **settings)


def computed_blocks(monkeypatch) -> list[tuple[int, int]]:
    """(view, block) of all that is computed from here on."""
    seen, original = [], FeatureCache._compute

    def counting(self, autocast, view, block, *rest):
        seen.append((view, block))
        return original(self, autocast, view, block, *rest)

    monkeypatch.setattr(FeatureCache, "_compute", counting)
    return seen


def test_rows_are_what_the_trunk_gives(stores, tmp_path):
    model = tiny_model().eval()
    ours = cache(tmp_path, stores, model=model)
    ours.build(ALONE, nullcontext)
    keys = torch.tensor([7, 0, 19, 7])
    pixels = torch.stack(
        [model.image_tower.preprocessing.decode(ours.store.image(ours.store.image_ids[key])) for key in keys]
    )
    with torch.inference_mode():
        torch.testing.assert_close(ours.rows(keys, epoch=3), model.image_trunk(pixels), **ROUNDED)


def test_epochs_take_turns_with_the_views(stores, tmp_path):
    ours = cache(tmp_path, stores, views=3, augment=CROPPED)
    ours.build(ALONE, nullcontext)
    keys = torch.arange(20)
    epochs = [ours.rows(keys, epoch) for epoch in range(6)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((epochs[a] - epochs[b]).abs().amax(1) > 1e-4).all()  # every picture was drawn anew
    assert all(torch.equal(epochs[n], epochs[n + 3]) for n in range(3))


def test_an_interrupted_building_continues(stores, tmp_path, monkeypatch):
    settings = {"views": 2, "augment": CROPPED}
    whole = cache(tmp_path / "whole", stores, **settings)
    whole.build(ALONE, nullcontext)
    seen = computed_blocks(monkeypatch)
    counting = FeatureCache._compute

    def interrupted(self, *arguments):
        if len(seen) == 7:
            raise KeyboardInterrupt
        return counting(self, *arguments)

    monkeypatch.setattr(FeatureCache, "_compute", interrupted)
    broken = cache(tmp_path / "broken", stores, **settings)
    with pytest.raises(KeyboardInterrupt):
        broken.build(ALONE, nullcontext)
    assert not broken.complete
    monkeypatch.setattr(FeatureCache, "_compute", counting)
    again = cache(tmp_path / "broken", stores, **settings)
    again.build(ALONE, nullcontext)
    assert seen == [(view, block) for view in range(2) for block in range(5)]  # each once
    np.testing.assert_allclose(again._features, whole._features, **ROUNDED)


def test_a_later_run_reads_it_and_another_trunk_does_not(stores, tmp_path, monkeypatch):
    cache(tmp_path, stores).build(ALONE, nullcontext)
    seen = computed_blocks(monkeypatch)
    later = cache(tmp_path, stores)
    assert later.complete
    later.build(ALONE, nullcontext)
    assert not seen
    projected = tiny_model().eval()
    torch.nn.init.ones_(projected.image_tower.visual_projection.weight)
    assert cache(tmp_path, stores, model=projected).complete  # the projection trains; the trunk before it counts
    for changes in (
        {"model": tiny_model(seed=1).eval()},
        {"precision": "bf16"},
        {"reduced": True},
        {"augment": CROPPED},
    ):
        assert not cache(tmp_path, stores, **changes).complete


@pytest.mark.slow
def test_two_devices_share_the_work(stores, tmp_path, monkeypatch):
    alone = cache(tmp_path / "alone", stores)
    alone.build(ALONE, nullcontext)
    seen, barrier = computed_blocks(monkeypatch), threading.Barrier(2, timeout=60)
    both = [cache(tmp_path / "both", stores) for _ in range(2)]
    original = np.load

    def load(path, *arguments, **keywords):
        if path.name == "done.npy" and threading.current_thread().name == "1":
            time.sleep(1)  # the other one would have marked blocks by now, did nobody wait for this one
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(feature_rows.np, "load", load)

    def build(rank):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"),
            is_main_process=rank == 0,
            process_index=rank,
            num_processes=2,
            wait_for_everyone=barrier.wait,
        )
        both[rank].build(accelerator, nullcontext)

    threads = [threading.Thread(target=build, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(0, block) for block in range(5)]
    for one in both:
        np.testing.assert_allclose(one._features, alone._features, **ROUNDED)


def test_runs_that_begin_together_share_the_arrays(stores, tmp_path, monkeypatch):
    alone = cache(tmp_path / "alone", stores)
    alone.build(ALONE, nullcontext)
    made, original, both = [], feature_rows._new_array, [cache(tmp_path / "both", stores) for _ in range(2)]

    def slowly(path, *arguments):
        made.append(path.name)
        time.sleep(0.2)
        original(path, *arguments)

    monkeypatch.setattr(feature_rows, "_new_array", slowly)
    threads = [threading.Thread(target=one.build, args=(ALONE, nullcontext)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["features.npy", "done.npy"]
    for one in both:
        np.testing.assert_allclose(one._features, alone._features, **ROUNDED)


def test_every_block_is_somebodys_whenever_they_look(tmp_path):
    """Another run may write between the looks of two processes: what it has not written is still dealt whole."""
    rows = feature_rows.Rows(tmp_path, 64, 8)
    rows.create(2)
    first = rows.missing(0, 2)
    rows.write(rows.missing()[0], np.ones((8, 2), np.float32))
    second = rows.missing(1, 2)
    assert sorted(block.number for block in [*first, *second]) == list(range(8))


def test_faults_are_those_of_blocks_as_they_were_written(tmp_path):
    rows = Rows(tmp_path, 8, 4)
    rows.create(2)
    first, second = rows.missing()
    rows.write(first, np.ones((4, 2)), {1: "a", 5: "of another block"})
    (tmp_path / "damaged-0.jsonl").write_text("6\n")  # as version 0.1.0 kept them
    assert rows.faults() == {1: "a", 6: None} and rows.missing() == [second]
    rows.write(first, np.ones((4, 2)))  # again: the mark had not reached the disk, and the picture was mended
    assert rows.faults() == {6: None}
    with pytest.raises(ValueError, match="rows"):
        rows.write(second, np.ones((1, 2)))
    assert rows.missing() == [second] and not rows.has(second) and rows.read().sum() == 8


def test_a_disk_that_takes_no_more_is_told_and_the_block_is_not_marked(tmp_path, monkeypatch):
    rows = Rows(tmp_path, 8, 4, views=2, dtype=np.float16)
    rows.create(2)
    blocks = rows.missing()
    rows.write(blocks[1], np.ones((4, 2)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as changed, pytest.raises(UserError, match=r"features.npy cannot be written \(No space"):
        changed.setattr(os, "fsync", full)
        rows.write(blocks[2], np.ones((4, 2)))
    assert rows.missing() == [blocks[0], *blocks[2:]]
    for block in (blocks[0], *blocks[2:]):
        rows.write(block, np.full((4, 2), block.number))
    assert rows.read()[:, ::4, 0].tolist() == [[0, 1], [2, 3]] and not rows.missing()


@pytest.mark.parametrize("name", ["features.npy", "done.npy"])
@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_broken_arrays_are_told(stores, tmp_path, name, content):
    ours = cache(tmp_path, stores)
    ours.build(ALONE, nullcontext)
    if name == "done.npy":
        (ours.folder / "complete.json").unlink()
    whole = (ours.folder / name).read_bytes()
    (ours.folder / name).write_bytes(whole[:-1] if content is None else content)
    with pytest.raises(UserError, match=f"{name} cannot be used .*Remove {ours.folder}"):
        cache(tmp_path, stores).build(ALONE, nullcontext)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "name,other,said",
    [
        (
            "features.npy",
            np.zeros((1, 20, 5), np.float32),
            r"it holds float32 \[1, 20, 5\], expected float32 \[1, 20, 32\]",
        ),
        ("features.npy", np.zeros((1, 20, 32), np.float16), r"it holds float16 \[1, 20, 32\], expected float32"),
        ("features.npy", np.zeros((1, 20), np.float32), r"it holds float32 \[1, 20\], expected"),
        ("done.npy", np.zeros((1, 5), np.int64), r"it holds int64 \[1, 5\], expected uint8 \[1, 5\]"),
    ],
)
def test_arrays_of_another_shape_or_type_are_told(stores, tmp_path, name, other, said, complete):
    """Those of a tower whose code has changed, for one; also where blocks are yet to be written."""
    if complete and name == "done.npy":
        pytest.skip("no longer looked at")
    ours = cache(tmp_path, stores)
    ours.build(ALONE, nullcontext)
    if not complete:
        (ours.folder / "complete.json").unlink()
        np.save(ours.folder / "done.npy", np.uint8([[1, 1, 0, 1, 1]]))
    np.save(ours.folder / name, other)
    with pytest.raises(UserError, match=rf"{name} cannot be used \({said}.*Remove {ours.folder}"):
        cache(tmp_path, stores).build(ALONE, nullcontext)


def test_rows_that_are_no_numbers_are_told_in_every_view(tmp_path):
    rows = Rows(tmp_path, 20, 4, views=2)
    rows.create(3)
    for block in rows.missing():
        rows.write(block, np.ones((4, 3)), {17: "no picture"})
    rows.refuse_damage()
    array = np.load(rows.file)
    array[:, 17] = np.nan  # means nothing
    np.save(rows.file, array)
    rows.refuse_damage()
    array[0, 6, 2], array[1, [0, 6, 9, 10, 11, 12]] = np.inf, np.nan
    np.save(rows.file, array)
    with pytest.raises(
        UserError, match=rf"{rows.file} is damaged: 6 of 20 rows.*\(0, 6, 9, 10, 11, …\). Remove {tmp_path}:"
    ):
        rows.refuse_damage()


def test_features_that_are_no_numbers_are_not_kept(stores, tmp_path):
    model = tiny_model().eval()
    torch.nn.init.constant_(next(model.trunk_parameters()), float("nan"))
    ours = cache(tmp_path, stores, model=model)
    with pytest.raises(UserError, match="the image features hold NaN or infinity"):
        ours.build(ALONE, nullcontext)
    assert len(ours._rows.missing()) == 5


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is reserved where the system can")
def test_a_full_disk_is_told_before_anything_is_computed(stores, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space.*Features of [\d,]+ bytes are to be kept .*feature_cache=FOLDER"):
        cache(tmp_path, stores).build(ALONE, nullcontext)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
