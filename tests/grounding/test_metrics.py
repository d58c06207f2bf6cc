"""Protocols against cases made by hand: several boxes, none that hits, ties, a perfect map and one that says nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnclip_ft.grounding.boxes import iou
from cnclip_ft.grounding.heat import Heat, Region
from cnclip_ft.grounding.metrics import covered, enclosing, inside, judge, scores

LEFT, RIGHT, BOTH = (0.0, 0.0, 0.25, 0.5), (0.75, 0.0, 0.25, 0.5), (0.0, 0.0, 1.0, 0.5)
SPOT = [(0.1, 0.1, 0.05, 0.05)]


def regions(*pairs):
    return [Region(box, score) for box, score in pairs]


def test_one_of_several_boxes_is_enough_for_any_box_and_not_for_the_merged_one():
    one = judge(regions((RIGHT, 0.9), ((0, 0.5, 1, 0.5), 0.8), (BOTH, 0.1)), SPOT, [LEFT, RIGHT])
    assert (one.any_rank, one.merged_rank, one.single) == (1, 3, False)


def test_none_hits():
    one = judge(regions(((0.4, 0.6, 0.2, 0.2), 0.9)), [(0.5, 0.9, 0.01, 0.01)], [LEFT])
    assert (one.any_rank, one.merged_rank, one.pointing) == (None, None, 0)
    assert judge([], SPOT, [LEFT]).any_rank is None


def test_ties_count_against_the_model():
    wrong = (0.4, 0.6, 0.2, 0.2)
    assert judge(regions((LEFT, 0.5), (wrong, 0.5), (wrong, 0.5)), SPOT, [LEFT]).any_rank == 3
    assert judge(regions((LEFT, 0.6), (wrong, 0.5)), SPOT, [LEFT]).any_rank == 1
    # of two boxes that hit neither stands before the other
    assert judge(regions((LEFT, 0.5), (LEFT, 0.5)), SPOT, [LEFT]).any_rank == 1


def test_an_iou_of_a_half_is_near_enough():
    half = (0.0, 0.0, 0.25, 0.25)
    assert judge(regions((half, 1)), SPOT, [LEFT]).any_rank == 1
    assert judge(regions(((0.0, 0.0, 0.25, 0.249), 1)), SPOT, [LEFT]).any_rank is None


def test_scores_are_shares_of_the_phrases():
    judged = [
        judge(regions((LEFT, 1)), SPOT, [LEFT]),
        judge(regions((RIGHT, 1), (LEFT, 0.5)), [(0.8, 0.1, 0.02, 0.02)], [LEFT]),
        judge(regions((RIGHT, 1)), SPOT, [LEFT, RIGHT]),
        judge(regions(*[(RIGHT, 1)] * 11, (LEFT, 0.5)), SPOT, [LEFT]),
    ]
    found = scores(judged)
    assert found.any_box == {1: 50, 5: 75, 10: 75} and found.any_bound == 100
    assert found.merged_box == {1: 25, 5: 50, 10: 50} and found.merged_bound == 75
    assert found.singles == 3 and found.accuracy == pytest.approx(100 / 3)
    assert found.pointing == 75 and found.phrases == 4
    assert found.chance == pytest.approx((3 * 12.5 + 25) / 4) and found.centre == 0


def test_a_perfect_map_scores_100_and_one_that_says_nothing_the_chance_beside_it():
    generator, perfect, flat = np.random.default_rng(0), [], []
    for _ in range(40):
        row, column = generator.integers(0, 6, 2)
        tall, wide = generator.integers(1, 8 - max(row, column), 2)
        box = (column / 8, row / 8, wide / 8, tall / 8)
        values = np.zeros((8, 8), np.float32)
        values[row : row + tall, column : column + wide] = 1
        sure, nothing = Heat(values), Heat(np.full((8, 8), 0.3, np.float32))
        for heat, judged in ((sure, perfect), (nothing, flat)):
            judged.append(judge(heat.regions(0.5), heat.hottest, [box], heat.part))
    found = scores(perfect)
    assert (found.pointing, found.any_box[1], found.merged_box[1], found.accuracy) == (100, 100, 100, 100)
    nothing = scores(flat)
    assert nothing.pointing == pytest.approx(nothing.chance) and 0 < nothing.chance < 60
    assert nothing.chance == found.chance


def test_chance_is_that_of_what_is_seen():
    seen = (0.25, 0.0, 0.5, 1.0)
    one = judge([], Heat(np.zeros((2, 2), np.float32), seen).hottest, [(0.0, 0.0, 0.5, 1.0)], seen)
    assert one.pointing == one.chance == pytest.approx(0.5)


boxes = st.tuples(*[st.integers(0, 15)] * 2, *[st.integers(1, 8)] * 2).map(
    lambda b: (b[0], b[1], min(b[2], 16 - b[0]), min(b[3], 16 - b[1]))
)


@given(st.lists(boxes, min_size=1, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_areas_against_counted_cells(some, others):
    def cells(given):
        marked = np.zeros((16, 16), bool)
        for x, y, width, height in given:
            marked[y : y + height, x : x + width] = True
        return marked

    one, two = cells(some), cells(others)
    shares = [[tuple(side / 16 for side in box) for box in given] for given in (some, others)]
    assert covered(*shares) == pytest.approx((one & two).sum() / one.sum())
    first, second = cells(some[:1]), cells(others[:1])
    expected = (first & second).sum() / (first | second).sum()
    sides = torch.tensor([shares[0][0], shares[1][0]], dtype=torch.float64)
    one_box, other_box = torch.cat([sides[:, :2], sides[:, :2] + sides[:, 2:]], dim=1)
    assert float(iou(one_box, other_box)) == pytest.approx(expected)
    x, y, width, height = enclosing(np.array(shares[0]))[0] * 16
    rows, columns = np.nonzero(one)
    assert (x, y, x + width, y + height) == pytest.approx(
        (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    )
    assert inside(np.array(shares[0]), (columns[0] + 0.5) / 16, (rows[0] + 0.5) / 16)
