"""Ranks and the best of many against brute force and full sorts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnclip_ft.retrieval import scan as sweep
from cnclip_ft.retrieval.recall import ranks, ranks_and_topk, recall, split_ranks, summarise, topk
from data_tools.errors import UserError
from tests.evaluation.tiny import random_split

# Small whole numbers: ties are frequent and exact, and brute force is exact in Python integers.
VECTORS = st.lists(st.tuples(*[st.integers(-1, 1)] * 3), min_size=1, max_size=12)


def brute_ranks(queries, gallery, pairs):
    found = []
    for number, query in enumerate(queries):
        mine = {item for asking, item in pairs if asking == number}
        if not mine:
            found.append(0)
            continue
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery]
        best = max(scores[item] for item in mine)
        found.append(1 + sum(score >= best for item, score in enumerate(scores) if item not in mine))
    return found


def brute_topk(queries, gallery, k):
    found = []
    for query in queries:
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery]
        found.append(sorted(range(len(gallery)), key=lambda i: -scores[i])[:k])
    return found


@settings(max_examples=150, deadline=None)
@given(VECTORS, VECTORS, st.data())
def test_ranks_are_those_of_brute_force(queries, gallery, data):
    pair = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(gallery) - 1))
    pairs = data.draw(st.lists(pair, max_size=20))
    positives = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    found = ranks(torch.tensor(queries).float(), torch.tensor(gallery).float(), positives)
    assert found.tolist() == brute_ranks(queries, gallery, pairs)


@settings(max_examples=100, deadline=None)
@given(VECTORS, VECTORS, st.integers(1, 14))
def test_topk_is_that_of_brute_force_with_ties_in_the_gallerys_order(queries, gallery, k):
    _, found = topk(torch.tensor(queries).float(), torch.tensor(gallery).float(), k)
    assert found.tolist() == brute_topk(queries, gallery, k)


def test_topk_settles_ties_beyond_its_candidates():
    """More equal items than are kept as candidates: the first in the gallery must win, whatever the tiles."""
    gallery = torch.zeros(500, 2)
    gallery[::3, 0] = 1
    gallery[7] = torch.tensor([2.0, 0.0])
    values, found = topk(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), gallery, 5)
    assert found.tolist() == [[7, 0, 3, 6, 9], [0, 1, 2, 3, 4]]
    assert values.tolist() == [[2, 1, 1, 1, 1], [0, 0, 0, 0, 0]]


@pytest.fixture
def split():
    features = random_split(90, 300, dim=24, seed=3)
    # Repeated images and texts: equal scores far apart in the pool.
    features.image_features[60:] = features.image_features[:30]
    features.text_features[200:250] = features.text_features[:50]
    return features


def test_the_size_of_the_tiles_changes_nothing(split, monkeypatch):
    expected = recall(split).as_dict()
    top = topk(split.text_features, split.image_features, 10)
    for shape in ((1, 64), (7, 64), (300, 128)):
        monkeypatch.setattr(sweep, "tile_shape", lambda *_, shape=shape, **__: shape)
        assert recall(split).as_dict() == expected
        again = topk(split.text_features, split.image_features, 10)
        assert torch.allclose(again[0], top[0], atol=1e-6) and torch.equal(again[1], top[1])


def test_one_walk_gives_what_four_give(split, monkeypatch):
    for shape in (None, (7, 64)):
        if shape:
            monkeypatch.setattr(sweep, "tile_shape", lambda *_, **__: (7, 64))
        found, by_text, by_image = ranks_and_topk(split, 10)
        alone = split_ranks(split)
        assert torch.equal(found.text_ranks, alone.text_ranks) and torch.equal(found.image_ranks, alone.image_ranks)
        assert torch.equal(found.text_ranks, ranks(split.text_features, split.image_features, split.positives.flip(1)))
        assert torch.equal(
            found.image_ranks, ranks(split.image_features, split.text_features, split.positives)[found.image_index]
        )
        assert torch.equal(by_text[1], topk(split.text_features, split.image_features, 10)[1])
        assert torch.equal(by_image[1], topk(split.image_features, split.text_features, 10)[1])


def test_topk_over_many_blocks_equals_a_full_sort():
    torch.manual_seed(1)
    queries, gallery = F.normalize(torch.randn(20, 8), dim=1), F.normalize(torch.randn(5003, 8), dim=1)
    values, found = topk(queries, gallery, 7)
    full = queries.double() @ gallery.double().T
    assert torch.equal(found, full.topk(7, dim=1).indices)
    assert torch.allclose(values.double(), full.topk(7, dim=1).values, atol=1e-7)


def test_scores_closer_than_float32_can_tell_are_told_apart():
    """The positive is ahead by 1e-9: float32 products of these lengths cannot see it, float64 does."""
    queries = torch.zeros(1, 64)
    queries[0, :2] = torch.tensor([1.0, 2.0**-12])
    gallery = torch.zeros(3, 64)
    gallery[:, 0] = 1.0
    gallery[:, 1] = torch.tensor([0.0, 2.0**-18, 2.0**-17])
    assert ranks(queries, gallery, torch.tensor([[0, 2]])).tolist() == [1]
    assert ranks(queries, gallery, torch.tensor([[0, 0]])).tolist() == [3]
    assert topk(queries, gallery, 3)[1].tolist() == [[2, 1, 0]]


def test_a_model_that_gives_everything_the_same_feature_scores_nothing():
    features = random_split(20, 60)
    features.image_features = features.text_features = F.normalize(torch.ones(60, 16), dim=1)
    features.image_features = features.image_features[:20]
    scores = recall(features)
    assert scores.mean_recall == 0
    assert scores.text_to_image.median_rank == 20 and scores.image_to_text.median_rank == 58  # its own three excluded


def test_a_collapsed_model_takes_the_dense_path_and_agrees(monkeypatch):
    torch.manual_seed(0)
    base = F.normalize(torch.randn(1, 32), dim=1)
    features = random_split(300, 600, dim=32)
    features.image_features = base + 1e-7 * torch.randn(300, 32)
    features.text_features = base + 1e-7 * torch.randn(600, 32)
    calls = []
    dense = sweep.RankLooker._float64_hits
    monkeypatch.setattr(sweep.RankLooker, "_float64_hits", lambda *a: calls.append(1) or dense(*a))
    found = ranks(features.text_features, features.image_features, features.positives.flip(1))
    full = features.text_features.double() @ features.image_features.double().T
    best = full.gather(1, features.positives[:, :1])
    assert calls and torch.equal(found, (full >= best - 1e-12).sum(1))


def test_half_precision_features_are_scored_as_the_numbers_they_are():
    features = random_split(40, 80, seed=5)
    half = dataclasses.replace(
        features, image_features=features.image_features.half(), text_features=features.text_features.half()
    )
    single = dataclasses.replace(
        features, image_features=half.image_features.float(), text_features=half.text_features.float()
    )
    assert recall(half).as_dict() == recall(single).as_dict()


def test_autocast_around_it_changes_nothing(split):
    expected = recall(split).as_dict()
    with torch.autocast("cpu", torch.bfloat16):
        assert recall(split).as_dict() == expected


def test_languages_are_scored_among_their_own_texts_and_all_images():
    features = random_split(30, 90, seed=2)
    features.languages = ["zh" if i % 3 else None for i in range(90)]
    scores = recall(features)
    assert set(scores.by_language) == {"zh", "unlabelled"}
    chinese = torch.tensor([i for i in range(90) if i % 3])
    alone = recall(features.with_texts(chinese))
    assert scores.by_language["zh"].as_dict() == alone.as_dict()
    assert alone.image_to_text.gallery == 60 and alone.text_to_image.gallery == 30
    one = dataclasses.replace(features, languages=["zh"] * 90)
    assert recall(one).by_language == {}


def test_missing_ground_truth_is_said_and_left_out():
    features = random_split(10, 30)
    none = dataclasses.replace(features, positives=torch.empty(0, 2, dtype=torch.int64))
    scores = recall(none)
    assert scores.text_to_image is None and scores.image_to_text is None and scores.mean_recall is None
    assert [note.split(" left out")[0] for note in scores.notes] == ["text→image", "image→text"]
    some = dataclasses.replace(features, positives=features.positives[:5])
    scores = recall(some)
    assert scores.text_to_image.queries == scores.image_to_text.queries == 5
    assert scores.text_to_image.gallery == 10 and scores.image_to_text.gallery == 30
    assert "25 of 30 texts have no known image" in scores.notes[0]


def test_one_image_one_text():
    scores = recall(random_split(1, 1))
    assert scores.mean_recall == 100 and scores.text_to_image.median_rank == 1


def test_broken_features_do_not_look_like_a_perfect_model():
    features = random_split(5, 10)
    features.text_features = features.text_features * float("nan")
    with pytest.raises(UserError, match="NaN"):
        recall(features)


def test_summary_in_percent():
    direction = summarise(torch.tensor([1, 3, 7, 20]), 50)
    assert direction.recall == {1: 25.0, 5: 50.0, 10: 75.0} and direction.median_rank == 5
    assert direction.mean_recall == 50 and direction.as_dict()["r10"] == 75
    assert summarise(torch.tensor([], dtype=torch.int64), 50) is None
