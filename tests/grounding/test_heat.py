"""Heat maps: where they lie in the upright picture, their regions, and their hottest place."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cnclip_ft.grounding.heat import Heat, connected, heats
from cnclip_ft.models.patches import PatchedPicture
from cnclip_ft.models.preprocessing import SquarePicture


def heat(rows, part=(0.0, 0.0, 1.0, 1.0)):
    return Heat(np.array(rows, np.float32), part)


def flooded(mask):
    """Regions by flooding from place to place, numbered in the order of their first place."""
    labels, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        waiting = deque([start])
        while waiting:
            row, column = waiting.popleft()
            if not (0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]):
                continue
            if mask[row, column] and not labels[row, column]:
                labels[row, column] = count
                waiting += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return labels


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.3, 0.5, 0.7, 1.0, 0.0]))
def test_regions_are_those_of_flooding(seed, rows, columns, share):
    mask = np.random.default_rng(seed).random((rows, columns)) < share
    assert np.array_equal(connected(mask), flooded(mask))


def test_boxes_lie_around_what_is_hot_and_the_hottest_comes_first():
    found = heat([[9, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 7], [0, 0, 0, 0]]).regions(0.5)
    assert [region.score for region in found] == pytest.approx([9, 7], abs=0.01)
    # Half of the way from 9 to 0 lies half a patch beyond the middle of the patch, at its edge.
    assert found[0].box == pytest.approx((0, 0, 0.25, 0.25), abs=0.02)
    x, y, width, height = found[1].box
    assert (x + width, y + height / 2) == pytest.approx((1, 0.5), abs=0.01) and 0.3 < height < 0.6 and width < 0.25


def test_threshold_one_is_the_hottest_place_and_zero_the_whole_part():
    values = [[0.1, 0.2], [0.3, 0.4]]
    (only,) = heat(values, (0.25, 0, 0.5, 1)).regions(0)
    assert only.box == pytest.approx((0.25, 0, 0.5, 1))
    (hottest,) = heat(values, (0.25, 0, 0.5, 1)).regions(1)
    assert hottest.box[0] > 0.5 and hottest.box[1] > 0.5 and hottest.score == pytest.approx(0.4)


def test_a_map_that_is_the_same_everywhere_is_one_region_and_all_of_it_the_hottest():
    flat = heat([[0.2] * 3] * 2)
    (only,) = flat.regions(0.6)
    assert only.box == pytest.approx((0, 0, 1, 1)) and len(flat.hottest) == 6
    assert np.array_equal(flat.over(30, 20), np.zeros((20, 30)))


def test_only_so_many_regions():
    spots = np.zeros((9, 9), np.float32)
    spots[::2, ::2] = np.arange(25).reshape(5, 5) + 10
    found = Heat(spots).regions(0.2, most=3)
    assert [region.score for region in found] == sorted((region.score for region in found), reverse=True)
    assert len(found) == 3 and found[0].box[0] > 0.8


@pytest.mark.parametrize("fit", ["squash", "crop", "crop_even"])
@pytest.mark.parametrize("size", [(64, 64), (200, 64), (50, 163), (1, 3000), (3000, 1), (33, 40)])
def test_what_is_seen_of_a_picture_is_what_was_decoded(fit, size):
    """Columns and rows of a picture that say where they are: what the tower gets says what part it is."""
    width, height = size
    across = np.linspace(0, 255, width).round() if width > 1 else np.array([0.0])
    down = np.linspace(0, 255, height).round() if height > 1 else np.array([0.0])
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = across[None], down[:, None]
    picture = SquarePicture(32, fit)
    seen = picture.decode(Image.fromarray(pixels)).float() / 255
    x, y, wide, tall = picture.part(width, height)
    assert 0 <= x <= x + wide <= 1 + 1e-9 and 0 <= y <= y + tall <= 1 + 1e-9
    for channel, (start, share, length) in enumerate(((x, wide, width), (y, tall, height))):
        if length < 2:
            continue
        line = seen[channel].mean(1 - channel if channel else 0) if channel == 0 else seen[1].mean(1)
        places = start + share * (torch.arange(32) + 0.5) / 32
        # the value of a place is its share, but for the half pixels at the picture's edges
        values = ((places * length - 0.5) / (length - 1)).clamp(0, 1)
        torch.testing.assert_close(line[4:-4], values[4:-4].float(), atol=0.02, rtol=0)


def test_borders_that_a_crop_loses_have_no_heat():
    part = SquarePicture(32, "crop").part(96, 32)
    assert part == pytest.approx((1 / 3, 0, 1 / 3, 1))
    whole = heat([[0, 1], [0, 1]], part).over(90, 30)
    assert np.isnan(whole[:, :30]).all() and np.isnan(whole[:, 60:]).all() and not np.isnan(whole[:, 30:60]).any()
    assert whole[0, 30] == 0 and whole[0, 59] == 1
    assert heat([[0, 1], [0, 1]], part).point == pytest.approx((7 / 12, 0.25))


def test_pictures_in_their_own_shape_are_seen_whole():
    assert PatchedPicture().part(300, 20) == (0, 0, 1, 1)


def test_maps_are_cosines_over_what_whole_patches_cover():
    features = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    phrases = torch.nn.functional.normalize(torch.randn(2, 5), dim=1)
    found = heats(features, 2, 3, phrases, (0.1, 0, 0.8, 1), (0.5, 0.75))
    assert found[0].part == pytest.approx((0.1, 0, 0.6, 0.5))
    for number, one in enumerate(found):
        for row in range(2):
            for column in range(3):
                expected = float(sum(features[3 * row + column] * phrases[number]))
                assert one.values[row, column] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("part", [(0, 0.4999, 1, 0.0001), (0.49, 0, 0.02, 1)])
def test_a_sliver_of_a_line_is_drawn(part):
    whole = heat([[0, 1]], part).over(1, 3000)
    assert whole.shape == (3000, 1) and not np.isnan(whole).all()
