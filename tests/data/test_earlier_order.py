"""Runs of earlier versions go on with its order, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cnclip_ft.data.earlier_order import EarlierOrder
from tests.data.test_batching import make_table
from tests.data.test_mixture import mixed


def sha(order: EarlierOrder) -> str:
    found = np.concatenate([order.epoch(epoch) for epoch in range(3)])
    return hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()[:16]


def test_every_order_is_as_it_was_written_down():
    images, lengths = np.arange(300) // 5, np.arange(300) % 17 + 3
    order = EarlierOrder(make_table(images, lengths=lengths), 20, seed=7, length_window=3)
    assert sha(order) == "6059f7d33eb1df93"
    assert sha(EarlierOrder(make_table(range(103)), 10, seed=1, without_images={3})) == "42e2c0c0f7a02827"
    assert sha(mixed((100, 300, 77), (2, 1, 0.5), kind=EarlierOrder)) == "c198734af020f338"
    assert sha(mixed((100, 300, 77), (2, 1, 0.5), by_store=True, kind=EarlierOrder)) == "774bc250bdeb7858"
    assert EarlierOrder(make_table(range(103)), 10, seed=1).step(0).tolist() == [87, 8, 16, 45, 6, 43, 66, 5, 61, 48]


@pytest.mark.parametrize("by_store", [False, True])
def test_a_step_is_the_epochs_row(by_store):
    order = mixed((57, 91), (2, 1), by_store=by_store, kind=EarlierOrder)
    epochs = np.concatenate([order.epoch(epoch) for epoch in range(2)])
    assert [order.step(step).tolist() for step in (0, 31, 7)] == epochs[[0, 31, 7]].tolist()
