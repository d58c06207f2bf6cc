"""Boxes, matching and the loss of learnt boxes against brute force in float64."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cnclip_ft.grounding.boxes import area, centred, corners, giou, iou, stored
from cnclip_ft.grounding.matching import ALPHA, GAMMA, Targets, costs, focal, inside, losses, match
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.dense import Tokens
from cnclip_ft.models.heads import PRIOR, GroundingHeads, around, new_heads, patch_places
from tests.training.helpers import tiny_model


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Centred, inside the picture."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.05 + 0.4 * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    place = size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    return torch.cat([place, size], -1)


def plain_iou(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes by their corners, number by number."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union, shared / union - (around - union) / around


def test_the_forms_of_a_box_are_each_other():
    given = torch.tensor([0.2, 0.1, 0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(centred(given), torch.tensor([0.4, 0.4, 0.4, 0.6], dtype=torch.float64))
    torch.testing.assert_close(corners(centred(given)), torch.tensor([0.2, 0.1, 0.6, 0.7], dtype=torch.float64))
    boxes = random_boxes(50)
    torch.testing.assert_close(centred(stored(boxes)), boxes)
    torch.testing.assert_close(area(corners(boxes)), boxes[:, 2] * boxes[:, 3])


def test_overlaps_are_those_of_two_boxes_at_a_time():
    one, other = corners(random_boxes(20)), corners(random_boxes(30, seed=1))
    for found, which in ((iou(one[:, None], other), 0), (giou(one[:, None], other), 1)):
        expected = [[plain_iou(a, b)[which] for b in other.tolist()] for a in one.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert giou(one, one).allclose(torch.ones(20, dtype=torch.float64))
    nothing = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    assert iou(nothing, nothing) == 0 and torch.isfinite(giou(nothing, one[:1])).all()


def some_targets(seed: int = 0, regions: int = 6) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Three pictures with 3, 1 and 2 boxes, 4 phrases each of which the last picture is asked 3."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, regions, 4, generator=generator, dtype=torch.float64)
    says = torch.zeros(3, 3, 4, dtype=torch.bool)
    for picture, box, phrase in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 2, 3), (1, 0, 2), (2, 0, 0), (2, 1, 1)):
        says[picture, box, phrase] = True
    asked = torch.ones(3, 4, dtype=torch.bool)
    asked[2, 3] = False
    targets = Targets(random_boxes(3, 3, seed=seed + 5), torch.tensor([3, 1, 2]), says, asked)
    return scores, random_boxes(3, regions, seed=seed + 9), targets


def plain_focal(score: float, wanted: bool) -> float:
    sure = 1 / (1 + math.exp(-score))
    return -ALPHA * (1 - sure) ** GAMMA * math.log(sure) if wanted else -(1 - ALPHA) * sure**GAMMA * math.log(1 - sure)


def plain_cost(scores, boxes, targets, picture: int, region: int, box: int) -> float:
    phrases = [k for k in range(4) if targets.says[picture, box, k]]
    one = [plain_focal(float(scores[picture, region, k]), True) for k in phrases]
    none = [plain_focal(float(scores[picture, region, k]), False) for k in phrases]
    mine, wanted = boxes[picture, region], targets.boxes[picture, box]
    overlap = plain_iou(corners(mine).tolist(), corners(wanted).tolist())[1]
    return (sum(one) - sum(none)) / len(phrases) + float((mine - wanted).abs().sum()) + 1 - overlap


@pytest.mark.parametrize("seed", range(5))
def test_the_matching_is_the_cheapest_of_all(seed):
    scores, boxes, targets = some_targets(seed)
    every = torch.ones(3, 6, dtype=torch.bool)
    found, table = match(scores, boxes, every, targets), costs(scores, boxes, targets)
    for picture, count in enumerate(targets.counts.tolist()):
        cost = [[plain_cost(scores, boxes, targets, picture, r, b) for b in range(count)] for r in range(6)]
        torch.testing.assert_close(table[picture, :, :count], torch.tensor(cost, dtype=torch.float64))
        best = min(itertools.permutations(range(6), count), key=lambda way: sum(cost[r][b] for b, r in enumerate(way)))
        assert found[picture].tolist() == [*best, *[-1] * (3 - count)]


def test_more_boxes_than_regions_leave_some_without():
    scores, boxes, targets = some_targets(regions=2)
    found = match(scores, boxes, torch.ones(3, 2, dtype=torch.bool), targets)
    assert sorted(found[0].tolist())[0] == -1 and len({*found[0].tolist()} - {-1}) == 2
    assert torch.isfinite(losses(scores, boxes, targets, found).total).all()


def test_what_fills_up_a_picture_is_matched_with_nothing():
    """Also where it would be the cheapest, and where a picture has more boxes than regions."""
    scores, boxes, targets = some_targets()
    real = torch.tensor([[True, False] * 3, [False, True] * 3, [False, False, True, False, False, False]])
    scores[~real], boxes[0, 1] = -30.0, targets.boxes[0, 0]
    found = match(scores, boxes, real, targets)
    for picture in range(3):
        kept = real[picture].nonzero()[:, 0]
        alone = [part[picture : picture + 1] for part in (targets.boxes, targets.counts, targets.says, targets.asked)]
        own = match(
            scores[picture : picture + 1, kept],
            boxes[picture : picture + 1, kept],
            real[picture, kept][None],
            Targets(*alone),
        )[0]
        assert found[picture].tolist() == torch.where(own >= 0, kept[own.clamp(min=0)], -1).tolist()
    assert sorted(found[2].tolist()) == [-1, -1, 2]


def test_the_loss_is_what_is_written_down():
    scores, boxes, targets = some_targets()
    scores.requires_grad_(), boxes.requires_grad_()
    matched = match(scores, boxes, torch.ones(3, 6, dtype=torch.bool), targets)
    parts = losses(scores, boxes, targets, matched)
    for picture, count in enumerate(targets.counts.tolist()):
        wanted = {(int(matched[picture, b]), k) for b in range(count) for k in range(4) if targets.says[picture, b, k]}
        expected = sum(
            plain_focal(float(scores[picture, r, k]), (r, k) in wanted)
            for r in range(6)
            for k in range(4)
            if targets.asked[picture, k]
        )
        assert float(parts.focal[picture]) == pytest.approx(expected / count, abs=1e-12)
        mine = [(boxes[picture, matched[picture, b]], targets.boxes[picture, b]) for b in range(count)]
        distance = sum(float((a - b).abs().sum()) for a, b in mine)
        assert float(parts.distance[picture]) == pytest.approx(distance / count, abs=1e-12)
        overlap = sum(1 - plain_iou(corners(a).tolist(), corners(b).tolist())[1] for a, b in mine)
        assert float(parts.overlap[picture]) == pytest.approx(overlap / count, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda s, b: losses(s, b, targets, matched).total, (scores, boxes), atol=1e-6, rtol=1e-4
    )
    unasked = torch.autograd.grad(losses(scores, boxes, targets, matched).total.sum(), scores)[0][2, :, 3]
    assert not unasked.any()


def test_patches_on_a_thing_learn_its_box():
    """The smallest box their middle lies in, each by itself, against numbers one by one."""
    grid = torch.tensor([[4, 4], [2, 3], [4, 4]])
    places, real = patch_places(grid, 16)
    places = places.double()
    targets = Targets(
        torch.tensor(
            [
                [[0.5, 0.5, 0.8, 0.8], [0.4, 0.4, 0.3, 0.3], [0.9, 0.9, 0.1, 0.1]],
                [[0.6, 0.3, 0.7, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
                [[0.52, 0.52, 0.02, 0.02], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]],
            ],
            dtype=torch.float64,
        ),
        torch.tensor([3, 1, 1]),
        torch.ones(3, 3, 1, dtype=torch.bool),
        torch.ones(3, 1, dtype=torch.bool),
    )
    boxes = random_boxes(3, 16).requires_grad_()
    found = inside(boxes, places, real, targets)
    for picture, (rows, columns) in enumerate(grid.tolist()):
        missed = []
        for region in range(rows * columns):
            x, y = (region % columns + 0.5) / columns, (region // columns + 0.5) / rows
            held = []
            for box in targets.boxes[picture, : targets.counts[picture]]:
                (x1, y1, x2, y2), area_of = corners(box).tolist(), float(box[2] * box[3])
                if x1 < x < x2 and y1 < y < y2:
                    held.append((area_of, box))
            if held:
                own, mine = min(held, key=lambda each: each[0])[1], boxes[picture, region].detach()
                overlap = plain_iou(corners(mine).tolist(), corners(own).tolist())[1]
                missed.append(float((mine - own).abs().sum()) + 1 - overlap)
        assert float(found[picture].detach()) == pytest.approx(sum(missed) / max(len(missed), 1), abs=1e-12)
    assert not found[2] and torch.isfinite(torch.autograd.grad(found.sum(), boxes)[0]).all()


@pytest.mark.parametrize("grid", [[[3, 4], [3, 4]], [[2, 5], [4, 1]]])
def test_the_patches_around_are_a_convolution_over_the_grid(grid):
    torch.manual_seed(0)
    tokens, kernel = torch.randn(2, 14, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    found = around(tokens, torch.tensor(grid), kernel)
    for picture, (rows, columns) in enumerate(grid):
        canvas = tokens[picture, : rows * columns].T.reshape(1, 6, rows, columns)
        expected = torch.nn.functional.conv2d(canvas, kernel.T.reshape(6, 1, 3, 3), padding=1, groups=6)
        torch.testing.assert_close(found[picture, : rows * columns], expected[0].flatten(1).T)


def test_focal_weighs_what_is_missed():
    scores = torch.linspace(-6, 6, 25, dtype=torch.float64)
    for wanted in (True, False):
        expected = torch.tensor([plain_focal(float(s), wanted) for s in scores], dtype=torch.float64)
        torch.testing.assert_close(focal(scores, torch.full((25,), wanted)), expected, atol=1e-12, rtol=1e-9)


def test_heads_begin_with_the_patches_own_boxes_and_the_prior():
    torch.manual_seed(0)
    heads = GroundingHeads(32, 16)
    grid = torch.tensor([[3, 4]]).expand(2, 2)
    (places, _), real = patch_places(grid, 12)
    assert real.all() and patch_places(grid, 14)[1].sum() == 24
    half = patch_places(grid, 12, seen=(0.5, 1.0))[0][0]
    torch.testing.assert_close(half, places * torch.tensor([1, 0.5, 1, 0.5]))
    assert places[0].tolist() == pytest.approx([1 / 8, 1 / 6, 1 / 4, 1 / 3]) and len(places) == 12
    assert places[5].tolist() == pytest.approx([3 / 8, 1 / 2, 1 / 4, 1 / 3])
    regions = heads(Tokens(torch.randn(2, 12, 32), torch.randn(2, 32), grid))
    assert float((regions.boxes - places).abs().max()) < 0.05
    words = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    sure = torch.sigmoid(regions.scores(words))
    assert sure.shape == (2, 12, 5) and 0.3 * PRIOR < float(sure.median()) < 3 * PRIOR
    each = regions.scores(torch.stack([words, words.flip(0)]))
    torch.testing.assert_close(each[0], regions.scores(words)[0])
    torch.testing.assert_close(each[1], regions.scores(words)[1].flip(-1))


def test_heads_from_before_are_read_as_the_product(tmp_path):
    """Regions were patch times pooled alone, and checkpoints say nothing of how they are mixed."""
    model = tiny_model(dropout=0.0)
    torch.manual_seed(0)
    model.heads = new_heads(model.image_tower)
    torch.nn.init.normal_(model.heads.box[-1].weight)
    save_checkpoint(model, tmp_path / "new", info={})
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    new = [f"heads.{name}" for name in ("own", "times", "around", "beside.weight", "beside.bias")]
    old = {name: tensor for name, tensor in tensors.items() if name not in new}
    assert len(old) == len(tensors) - 5
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    save_file(old, tmp_path / "old" / "model.safetensors")
    info = json.loads((tmp_path / "old" / "cnclip_ft.json").read_text(encoding="utf-8"))
    info.pop("weights_sha256", None)
    (tmp_path / "old" / "cnclip_ft.json").write_text(json.dumps(info), encoding="utf-8")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = load(tmp_path / "old").regions(pixels)
        assert not torch.equal(found.boxes, load(tmp_path / "new").regions(pixels).boxes)
        model.eval()
        model.heads.own.zero_()
        model.heads.times.fill_(1)
        model.heads.around.zero_()
        model.heads.beside.bias.zero_()
        torch.testing.assert_close(found.boxes, model.regions(pixels).boxes)


def test_a_score_is_what_is_written_down():
    heads = GroundingHeads(8, 6).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    tokens, pooled = torch.randn(1, 2, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    words = torch.nn.functional.normalize(torch.randn(3, 6, dtype=torch.float64), dim=1)
    regions = heads(Tokens(tokens, pooled, torch.tensor([[1, 2]])))
    mixed = [tokens[0, region] * (heads.own + heads.times * pooled[0]) for region in range(2)]
    normed = [torch.nn.functional.layer_norm(each, (8,), heads.norm.weight, heads.norm.bias) for each in mixed]
    for region in range(2):
        # the fifth of nine is the patch itself, the fourth the one to its left, the sixth the one to its right
        beside = normed[region] * heads.around[4] + normed[1 - region] * heads.around[3 if region else 5]
        merged = normed[region] + heads.beside(torch.nn.functional.gelu(beside))
        feature = merged @ heads.feature.weight.T + heads.feature.bias
        scale = float(merged @ heads.scale.weight[0] + heads.scale.bias)
        factor = (scale if scale > 0 else math.expm1(scale)) + 1
        shift = float(merged @ heads.shift.weight[0] + heads.shift.bias)
        for phrase in range(3):
            cosine = float(feature @ words[phrase] / feature.norm())
            assert float(regions.scores(words)[0, region, phrase]) == pytest.approx((cosine + shift) * factor)
