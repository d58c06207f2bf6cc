"""Thresholds: the curve is that of counting, wishes take the threshold that fulfils them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnclip_ft.evaluation.thresholds.calibration import choose, curve, in_words, read_pairs, sampled_scores, wilson
from data_tools.errors import DataFault, RequestError
from tests.evaluation.tiny import random_split

SCORES = torch.tensor([0.9, 0.8, 0.8, 0.7, 0.5, 0.5, 0.1], dtype=torch.float64)
LABELS = torch.tensor([True, True, False, True, False, False, True])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25))
def test_the_curve_is_that_of_counting(pairs):
    scores = torch.tensor([float(score) for score, _ in pairs], dtype=torch.float64)
    labels = torch.tensor([match for _, match in pairs])
    if not 0 < labels.sum() < len(labels):
        return
    points = curve(scores, labels)
    assert points.thresholds.tolist() == sorted(set(scores.tolist()), reverse=True)
    for number, threshold in enumerate(points.thresholds):
        accepted = labels[scores >= threshold]
        assert points.precision[number] == pytest.approx(accepted.double().mean().item())
        assert points.recall[number] == pytest.approx(accepted.sum().item() / labels.sum().item())


def test_a_wanted_precision_takes_the_lowest_threshold_that_has_it():
    points = curve(SCORES, LABELS)
    assert choose(points, precision=0.75).cosine == 0.7  # three of four
    assert choose(points, precision=1.0).cosine == 0.9
    assert choose(points, precision=0.5).cosine == 0.1


def test_a_wanted_recall_takes_the_highest_threshold_that_has_it():
    points = curve(SCORES, LABELS)
    assert choose(points, recall=0.5).cosine == 0.8
    assert choose(points, recall=1.0).cosine == 0.1 and choose(points, recall=0.25).cosine == 0.9


def test_precision_follows_the_share_of_matches_recall_does_not():
    rare = curve(SCORES, LABELS, share=0.01)
    plain = curve(SCORES, LABELS)
    assert torch.equal(rare.recall, plain.recall)
    # At 0.7: 3 of 4 matches and 1 of 3 others; with one match in a hundred 0.0075 against 0.33.
    assert rare.precision[2].item() == pytest.approx(0.01 * 0.75 / (0.01 * 0.75 + 0.99 / 3))
    assert choose(rare, recall=0.75, share=0.01).precision_interval is None


def test_wishes_that_make_no_sense_are_refused():
    points = curve(SCORES, LABELS)
    for wish in ({}, {"precision": 0.5, "recall": 0.5}):
        with pytest.raises(RequestError, match="either --precision or --recall"):
            choose(points, **wish)
    with pytest.raises(RequestError, match="between 0 and 1"):
        choose(points, recall=1.2)
    hard = curve(torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([False, True]))
    with pytest.raises(RequestError, match="no threshold reaches precision 0.9: the best is 0.500 at cosine 0.5"):
        choose(hard, precision=0.9)


def test_wilson_interval():
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # the textbook's values
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1


def test_negatives_never_are_matches_in_disguise():
    split = random_split(6, 18)
    split.texts = [f"句子{i % 3}" for i in range(18)]  # text i reads like i + 3, which belongs to another image
    scores, labels = sampled_scores(split, negatives=40, seed=0, prepare=str.lower)
    allowed = {(i % 3, i % 6) for i in range(18)}  # (what it reads, image)
    wrong = {
        round((split.image_features[image].double() @ split.text_features[text].double()).item(), 9)
        for text in range(18)
        for image in range(6)
        if (text % 3, image) in allowed
    }
    assert labels.sum() == 18 and len(scores) > 18
    assert not wrong & {round(score, 9) for score in scores[~labels].tolist()}
    again, _ = sampled_scores(split, negatives=40, seed=0, prepare=str.lower)
    assert torch.equal(again, scores)
    split.texts = ["一样"] * 18
    with pytest.raises(RequestError, match="no other pairs"):
        sampled_scores(split, negatives=3, seed=0, prepare=str.lower)


def test_pair_files(tmp_path):
    (tmp_path / "p.csv").write_text("image,text,match\na.png,猫,1\nb.png,狗,no\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(
        '{"image": "a.png", "text": "猫", "match": true}\n{"image": "b.png", "text": "狗", "match": 0}\n',
        encoding="utf-8",
    )
    assert read_pairs(tmp_path / "p.csv") == read_pairs(tmp_path / "p.jsonl")
    (tmp_path / "q.csv").write_text("image,text,match\na.png,猫,perhaps\n", encoding="utf-8")
    with pytest.raises(DataFault, match="q.csv:2: match is 'perhaps'"):
        read_pairs(tmp_path / "q.csv")
    (tmp_path / "q.csv").write_text("image,text\na.png,猫\n", encoding="utf-8")
    with pytest.raises(DataFault, match="q.csv:2: no match"):
        read_pairs(tmp_path / "q.csv")
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "text": "猫", "match": 1}\n', encoding="utf-8")
    with pytest.raises(RequestError, match="both are needed"):
        read_pairs(tmp_path / "q.jsonl")


def test_the_words_carry_the_numbers():
    found = choose(curve(SCORES, LABELS), recall=0.5)
    said = in_words(found, SCORES, LABELS, 20.0)
    assert "0.8000 upwards" in said and "times 20.0" in said and "66.7 %" in said
