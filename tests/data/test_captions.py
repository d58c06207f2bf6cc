"""One caption a picture and epoch: frequencies, purity, mixtures, what is refused; and orders of before, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cnclip_ft.data.batching import BatchOrder, StageSampler
from cnclip_ft.data.captions import OneCaption, caption_weights
from cnclip_ft.data.mixture import Mixture, Part
from cnclip_ft.data.pairs import Span
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.data.test_batching import make_table
from tests.data.test_images import encoded, picture


def weighted(images, weights, batch=10, **options) -> BatchOrder:
    table = make_table(images)
    table.weights = np.asarray(weights, float)
    spans = options.pop("spans", ())
    table.spans = tuple(Span(f"store {n}", *span) for n, span in enumerate(spans))
    return BatchOrder(table, batch, seed=3, **options)


def sha(order: BatchOrder) -> str:
    found = np.concatenate([order.epoch(epoch) for epoch in range(3)])
    return hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()[:16]


def test_an_epoch_is_as_long_as_there_are_pictures_and_shows_each_once():
    images = np.random.default_rng(0).permutation(np.arange(500) % 100)  # in any order
    order = weighted(images, np.ones(500))
    assert order.steps_per_epoch == 10
    for epoch in range(4):
        drawn = order.epoch(epoch)
        assert drawn.shape == (10, 10) and sorted(images[drawn.ravel()].tolist()) == list(range(100))
        assert np.array_equal(drawn, weighted(images, np.ones(500)).epoch(epoch))  # a pure function


@pytest.mark.parametrize("weight", [1e-320, 1e17, 1e308])
def test_weights_of_one_picture_do_not_reach_the_next(weight):
    """Counts of clicks, or of anything else, may be of any size."""
    images, weights = np.array([0, 0, 1, 1]), np.array([weight, weight, 1, 3])
    one = OneCaption(np.arange(4), images, weights, seed=1)
    drawn = np.stack([one.draw(one.units, visit) for visit in range(400)])  # [400, 2]
    assert np.array_equal(images[drawn], np.tile([0, 1], (400, 1)))
    assert (drawn == 1).mean(0)[0] == pytest.approx(0.5, abs=0.01) and (drawn == 3).mean(0)[1] == pytest.approx(
        0.75, abs=0.01
    )


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1), (8, 1, 1, 0.5, 2), (1000, 1, 1, 1, 1), (1e-9, 1, 3, 5, 7)])
def test_captions_are_drawn_as_often_as_their_weights_say(weights):
    """Within 1 % over epochs, of every picture by itself; and no picture waits long for a caption that is likely."""
    images, epochs = np.repeat(np.arange(40), 5), 400
    order = weighted(images, np.tile(weights, 40))
    drawn = np.stack([np.sort(order.epoch(epoch).ravel()) for epoch in range(epochs)])  # [epochs, 40]
    wanted = np.array(weights) / sum(weights)
    shares = np.stack([(drawn % 5 == caption).mean(0) for caption in range(5)], 1)
    assert np.abs(shares - wanted).max() <= 0.01
    first = np.stack([(drawn[:10] % 5 == caption).mean(0) for caption in range(5)], 1)
    assert np.abs(first - wanted).max() <= 0.25
    assert np.abs(first.mean(0) - wanted).max() <= 0.05  # over the pictures of few epochs


def test_every_share_lies_within_its_picture_however_many_there_are():
    images = np.repeat(np.arange(300_000), 3)
    one = OneCaption(np.arange(len(images)), images, np.random.default_rng(0).random(len(images)) + 1e-6, seed=0)
    for visit in (0, 1, 10**6):
        assert np.array_equal(images[one.draw(one.units, visit)], one.units)
    one._begin[:] = 1 - 2.0**-53  # rounded up, it would be the next picture's
    assert np.array_equal(images[one.draw(one.units, 0)], one.units)


def test_a_picture_visited_twice_in_an_epoch_shows_two_captions():
    order = weighted(np.repeat(np.arange(50), 4), np.ones(200), spans=[(0, 120, 2.0), (120, 200, 0.5)])
    images = order.table.image_keys
    assert order.steps_per_epoch == (60 + 10) // 10
    drawn = [order.epoch(epoch).ravel() for epoch in range(6)]
    assert [int((pairs < 120).sum()) for pairs in drawn] == [60] * 6  # pictures of a store as its weight says
    for pairs in drawn:
        assert len(np.unique(pairs)) == 70 and (np.bincount(images[pairs], minlength=30)[:30] == 2).all()
    halves = np.sort(images[np.concatenate(drawn[:2])][images[np.concatenate(drawn[:2])] >= 30])
    assert halves.tolist() == list(range(30, 50))  # no picture again before all have been
    shares = (
        np.bincount(np.concatenate([order.epoch(epoch).ravel() for epoch in range(200)]), minlength=200)[:120] / 400
    )
    assert np.abs(shares - 0.25).max() <= 0.01


def test_stores_alternate_and_devices_share_as_ever():
    order = weighted(np.repeat(np.arange(60), 3), np.ones(180), spans=[(0, 90, 1.0), (90, 180, 1.0)], by_store=True)
    for batch in order.epoch(0):
        assert len({bool(pair >= 90) for pair in batch}) == 1
    whole = list(StageSampler(order, 0, 12, 0, 1))
    parts = [list(StageSampler(order, 0, 12, rank, 2)) for rank in range(2)]
    assert all(sorted(a + b) == sorted(c) for a, b, c in zip(*parts, whole, strict=True))
    assert list(StageSampler(order, 7, 12, 0, 1)) == whole[7:]


def test_damaged_pictures_are_left_out():
    order = weighted(np.repeat(np.arange(30), 2), np.ones(60), without_images={4, 5})
    assert order.steps_per_epoch == 2 and not {4, 5} & set(order.table.image_keys[order.epoch(0)].ravel().tolist())


def test_a_batch_of_more_than_there_are_pictures_is_refused():
    with pytest.raises(
        RequestError, match=r"batch size \(31\) is larger than split \(30 pictures, one caption each\).*batch_size=30"
    ):
        weighted(np.repeat(np.arange(30), 2), np.ones(60), batch=31)
    with pytest.raises(RequestError, match=r"store 0 has 5 pictures, fewer than a batch of it alone \(10\)"):
        weighted(np.repeat(np.arange(30), 2), np.ones(60), spans=[(0, 10, 1.0), (10, 60, 1.0)], by_store=True)


def write(folder, weights, languages=("zh", "en", None)):
    """Pictures of three captions, with a weight where one is given."""
    with StoreWriter(folder) as writer:
        for number in range(4):
            writer.add_image(number, encoded(picture(40, 30 + number), "PNG"))
        for number in range(12):
            weight, language = weights.get(number), languages[number % 3]
            text = f"the picture {number}" if language == "en" else f"第 {number} 张图"
            writer.add_pair(number // 3, number, text, language, beside=weight and {"weight": weight})
        writer.finish()
    return open_store(folder)


def test_weights_that_pairs_keep_and_those_of_languages(tmp_path):
    store = write(tmp_path / "a", {1: 4, 7: 0.5})
    expected = np.ones(12)
    expected[[1, 7]] = 4, 0.5
    assert caption_weights(store, kept=True, languages={}).tolist() == expected.tolist()
    assert (caption_weights(store, kept=False, languages={}) == 1).all()
    times = np.tile([3, 2, 3], 4)  # a language that is not said is read off the letters
    assert caption_weights(store, kept=True, languages={"zh": 3, "en": 2}).tolist() == (expected * times).tolist()
    assert caption_weights(store, kept=False, languages={"en": 2}).tolist() == np.tile([1, 2, 1], 4).tolist()
    other = write(tmp_path / "b", {0: 7}, languages=("zh",) * 3)
    both = Mixture([Part(store), Part(other)])
    assert caption_weights(both, kept=True, languages={}).tolist() == [*expected, 7.0, *np.ones(11)]
    order = weighted(np.arange(12) // 3, caption_weights(store, kept=True, languages={}), batch=2)
    drawn = np.concatenate([order.epoch(epoch).ravel() for epoch in range(600)])
    assert np.bincount(drawn)[:3] / 600 == pytest.approx([1 / 6, 4 / 6, 1 / 6], abs=0.01)


def test_weights_that_are_not_there_are_not_passed_over(tmp_path):
    store, none = write(tmp_path / "a", {1: 4}), write(tmp_path / "b", {})
    for asked in (none, Mixture([Part(store), Part(none)])):
        with pytest.raises(
            RequestError, match=r"data.captions=weighted: no pair of .*b keeps a weight.*column `weight`.*captions=one"
        ):
            caption_weights(asked, kept=True, languages={})
    with pytest.raises(
        RequestError, match=r"mixed is named, and no caption of .*b is in that language \(there are en, zh\)"
    ):
        caption_weights(none, kept=False, languages={"zh": 2, "mixed": 1})
