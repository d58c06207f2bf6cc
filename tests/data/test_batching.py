"""Batches of an epoch: every pair at most once, like ones apart, any step by itself."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from cnclip_ft.data.batching import BatchOrder, StageSampler, repeats
from cnclip_ft.data.pairs import PairTable
from data_tools.errors import RequestError


def make_table(images, texts=None, lengths=None) -> PairTable:
    images = np.asarray(images, dtype=np.int64)
    texts = np.arange(len(images)) if texts is None else np.asarray(texts)
    lengths = np.full(len(images), 5) if lengths is None else np.asarray(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return PairTable(images, texts, np.zeros(starts[-1], dtype=np.intc), starts, 0)


def test_an_epoch_visits_every_pair_at_most_once_and_is_repeatable():
    order = BatchOrder(make_table(range(103)), 10, seed=1)
    epoch = order.epoch(0)
    assert epoch.shape == (10, 10) and len(np.unique(epoch)) == 100
    assert np.array_equal(epoch, BatchOrder(make_table(range(103)), 10, seed=1).epoch(0))
    assert not np.array_equal(np.sort(epoch.ravel()), np.sort(order.epoch(1).ravel())) or not np.array_equal(
        epoch, order.epoch(1)
    )


def test_pairs_of_one_image_are_kept_apart():
    images = np.repeat(np.arange(60), 5)
    order = BatchOrder(make_table(images, texts=np.arange(300) % 170), 30, seed=0)
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert len(np.unique(batches)) == 300
        clean = sum(len(np.unique(images[b])) == 30 and len(np.unique(b % 170)) == 30 for b in batches)
        assert clean >= 9  # only the end of an epoch may run out of others
    assert order.repeats_per_batch() < order.expected_repeats()


def test_where_nothing_can_be_kept_apart_no_pair_is_lost():
    order = BatchOrder(make_table([0] * 8 + [1] * 8), 4, seed=0)
    assert len(np.unique(order.epoch(0))) == 16


def test_length_window_groups_lengths_and_keeps_all_pairs():
    lengths = np.random.default_rng(0).integers(3, 50, 400)
    spread = {}
    for window in (1, 10):
        batches = BatchOrder(make_table(range(400), lengths=lengths), 40, seed=0, length_window=window).epoch(0)
        assert len(np.unique(batches)) == 400
        assert (np.diff(lengths[batches], axis=1) <= 0).all()
        spread[window] = lengths[batches].max(1).sum()
    assert spread[10] < 0.75 * spread[1]


@pytest.mark.parametrize("window", [None, 64])
def test_any_step_by_itself_is_the_row_of_its_epoch(window):
    images = np.repeat(np.arange(20_000), 5)
    table = make_table(images, texts=np.random.default_rng(0).integers(0, 50_000, len(images)))
    order = BatchOrder(table, 64, seed=5, order_window=window)
    whole = order.epoch(3)
    assert len(np.unique(whole)) == whole.size == 1562 * 64
    for step in (1561, 0, 700):
        fresh = BatchOrder(table, 64, seed=5, order_window=window)
        assert np.array_equal(fresh.step(3 * 1562 + step), whole[step])
    if window is None:
        assert repeats(images[whole]) == repeats(table.text_keys[whole]) == 0


def test_pairs_that_follow_each_other_come_in_runs():
    order = BatchOrder(make_table(range(100_000)), 100, seed=0, order_window=1600)
    rows = order.epoch(0)
    assert len(np.unique(rows)) == 100_000
    near = [len(np.unique(rows[step : step + 16] // 100)) for step in range(0, 900, 16)]
    assert max(near) <= 17  # a window's batches read sixteen runs, and what fills the last one up
    both = BatchOrder(make_table(range(2000)), 100, seed=0, order_window=100_000).epoch(0)
    assert len(np.unique(both // 100)) == 20  # a window of all is as good as none


def test_what_is_held_does_not_grow_with_the_epoch():
    tracemalloc.start()
    peaks = []
    for count in (200_000, 2_000_000):
        order = BatchOrder(make_table(np.arange(count) // 5, lengths=np.full(count, 1)), 256, seed=0)
        order.step(0)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for step in range(0, order.steps_per_epoch, 256):
            order.step(step)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20e6


def test_devices_share_a_global_batch_and_a_later_start_continues_it():
    order = BatchOrder(make_table(range(50)), 8, seed=3)
    whole = list(StageSampler(order, 0, 15, 0, 1))
    shares = [list(StageSampler(order, 0, 15, rank, 4)) for rank in range(4)]
    for step in range(15):
        assert sorted(i for share in shares for i in share[step]) == sorted(whole[step])
    assert list(StageSampler(order, 7, 15, 0, 1)) == whole[7:]


def test_pairs_of_unreadable_images_are_passed_over():
    order = BatchOrder(make_table(range(20)), 4, seed=0, without_images={3, 4})
    assert not {3, 4} & set(order.epoch(0).ravel().tolist())


def test_refusals():
    with pytest.raises(RequestError, match=r"batch size \(9\) is larger than the split \(8 pairs\)"):
        BatchOrder(make_table(range(8)), 9, seed=0, name="the split")
    with pytest.raises(RequestError, match="multiple of 3"):
        StageSampler(BatchOrder(make_table(range(8)), 4, seed=0), 0, 1, 0, 3)


def test_a_pair_that_repeats_picture_and_text_counts_once():
    images, texts = np.array([[0, 0, 1, 2], [0, 1, 2, 3]]), np.array([[5, 5, 5, 6], [5, 5, 6, 7]])
    assert (repeats(images), repeats(texts), repeats(images, texts)) == (1, 3, 3)
