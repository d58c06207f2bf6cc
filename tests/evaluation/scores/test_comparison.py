"""Differences told from chance: the columns, the intervals, how often equals are called different."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.evaluation.scores.comparison import compare, hit_table
from cnclip_ft.retrieval.recall import recall, split_ranks
from data_tools.errors import RequestError
from tests.evaluation.tiny import random_split


def table(features):
    return hit_table(features, split_ranks(features))


def noisier(features, noise, seed=9):
    torch.manual_seed(seed)
    worse = F.normalize(features.text_features + noise * torch.randn_like(features.text_features), dim=1)
    return dataclasses.replace(features, text_features=worse)


def test_the_two_columns_are_the_recalls_themselves():
    a = random_split(60, 150, seed=1)
    b = noisier(a, 0.2)
    found = compare(table(a), table(b), draws=100)
    ours, theirs = recall(a), recall(b)
    by_name = {d.measure: d for d in found}
    assert by_name["text→image R@5"].first == pytest.approx(ours.text_to_image.recall[5])
    assert by_name["image→text R@10"].second == pytest.approx(theirs.image_to_text.recall[10])
    assert by_name["mean recall"].difference == pytest.approx(theirs.mean_recall - ours.mean_recall)


def test_a_clear_loss_is_told_from_chance():
    a = random_split(150, 450, seed=1)
    mean = compare(table(a), table(noisier(a, 0.6)), draws=300)[-1]
    assert mean.high < 0 and mean.verdict == "A is better" and mean.better == 0
    back = compare(table(noisier(a, 0.6)), table(a), draws=300)[-1]
    assert back.verdict == "B is better" and (back.low, back.high) == pytest.approx((-mean.high, -mean.low))


def test_equally_good_models_are_seldom_called_different():
    """Twenty equally noisy versions of one split, in pairs: about one interval in twenty may exclude zero."""
    a = random_split(100, 300, seed=1)
    tables = [table(noisier(a, 0.3, seed=100 + number)) for number in range(20)]
    found = [compare(tables[i], tables[i + 1], draws=200)[-1] for i in range(0, 20, 2)]
    assert sum(difference.verdict != "may be chance" for difference in found) <= 2
    assert {difference.difference > 0 for difference in found} == {True, False}


def test_a_model_against_itself_is_a_tie_in_every_draw():
    a = table(random_split(20, 40))
    for found in compare(a, a, draws=100):
        assert (found.difference, found.low, found.high, found.better) == (0, 0, 0, 0.5)


def test_the_interval_has_the_width_theory_gives():
    """One query an image: the bootstrap's spread is that of a mean of independent differences."""
    torch.manual_seed(0)
    images = 400
    a = table(random_split(images, images, noise=1.0))
    b = dataclasses.replace(a, hits=(torch.rand_like(a.hits) < 0.5).double())
    found = compare(a, b, draws=4000)[0]
    gap = b.hits[:, 0] - a.hits[:, 0]
    spread = 100 * gap.std(correction=0).item() / images**0.5
    assert (found.high - found.low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.08)


def test_requests_that_make_no_sense_are_refused():
    a, b = table(random_split(10, 20)), table(random_split(10, 30))
    with pytest.raises(RequestError, match="same split"):
        compare(a, b)
    with pytest.raises(RequestError, match="100 or more"):
        compare(a, a, draws=10)
    with pytest.raises(RequestError, match="confidence"):
        compare(a, a, confidence=95)
    none = dataclasses.replace(random_split(10, 20), positives=torch.empty(0, 2, dtype=torch.int64))
    with pytest.raises(RequestError, match="no ground truth"):
        table(none)
