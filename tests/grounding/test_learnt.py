"""Learnt boxes where they are used: the best regions of a phrase, in shares of the upright picture, judged as all boxes are."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.data.boxed import build_box_table, part_of, read_boxed
from cnclip_ft.evaluation.kinds.boxes import BoxesFound, BoxesSplit
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.grounding import finder
from cnclip_ft.grounding.heat import Region
from cnclip_ft.grounding.learnt import Detections, detect, in_picture, merged
from cnclip_ft.grounding.metrics import judge, scores
from cnclip_ft.models.heads import Regions, new_heads
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.training.boxes import write_boxes
from tests.training.helpers import tiny_model


def regions_of(boxes: list[list[float]], chances: list[float]) -> Regions:
    """One picture whose regions have these centred boxes and, for the only phrase, these probabilities."""
    count = len(boxes)
    return Regions(
        torch.tensor([boxes]),
        torch.tensor([boxes]),
        torch.ones(1, count, 1),
        torch.logit(torch.tensor([chances])) - 1,
        torch.ones(1, count),
        torch.ones(1, count, dtype=torch.bool),
    )


def test_the_best_regions_come_first_and_each_thing_once():
    regions = regions_of(
        [[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.21, 0.2, 0.2, 0.2], [0.5, 0.5, 1.4, 0.2]], [0.6, 0.9, 0.7, 0.1]
    )
    ((found,),) = detect(regions, torch.ones(1, 1))
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.1]))
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.6, 0.6, 0.8, 0.8]))
    torch.testing.assert_close(found.boxes[2], torch.tensor([0.0, 0.4, 1.0, 0.6]))  # cut at the picture's edge
    ((every,),) = detect(regions, torch.ones(1, 1), same=1.0)
    assert len(every.scores) == 4
    hidden = regions._replace(real=torch.tensor([[True, False, True, True]]))
    assert detect(hidden, torch.ones(1, 1))[0][0].scores.tolist() == pytest.approx([0.7, 0.1])
    faint = hidden._replace(shift=torch.full((1, 4), -90.0))  # less probable than what fills up a picture
    assert len(detect(faint, torch.ones(1, 1), most=1)[0][0].scores) == 1
    assert len(detect(faint, torch.ones(1, 1), same=1.0)[0][0].scores) == 3


def test_boxes_lie_in_the_upright_picture():
    found = Detections(torch.tensor([[0.0, 0.5, 0.5, 1.0]]), torch.tensor([0.9]))
    (region,) = in_picture(found, (0.25, 0.0, 0.5, 1.0))
    assert region.box == pytest.approx((0.25, 0.5, 0.25, 0.5)) and region.score == pytest.approx(0.9)


def test_several_things_of_a_phrase_are_found_as_one():
    left, right, faint = (
        Region((0.1, 0.1, 0.2, 0.2), 0.9),
        Region((0.7, 0.1, 0.2, 0.2), 0.5),
        Region((0.1, 0.8, 0.1, 0.1), 0.3),
    )
    first, *rest = merged([left, right, faint])
    assert first.box == pytest.approx((0.1, 0.1, 0.8, 0.2)) and rest == [left, right, faint] and merged([]) == []
    true = [(0.1, 0.1, 0.2, 0.2), (0.7, 0.1, 0.2, 0.2)]
    judged = judge([left, right, faint], [left.box], true, merged_found=merged([left, right, faint]))
    assert (judged.any_rank, judged.merged_rank, judged.pointing) == (1, 1, 1.0)
    assert judge([left, right, faint], [left.box], true).merged_rank is None


@pytest.fixture(scope="module")
def learnt():
    model = tiny_model(dropout=0.0).eval()
    torch.manual_seed(1)
    model.heads = new_heads(model.image_tower).eval()
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_model_with_heads_is_asked_for_its_boxes(learnt):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    ((one, other),) = finder.ground(learnt, [picture], ["狗", "a cat"], threshold=0)
    assert one.learnt and one.phrase == "狗" and one.heat.values.shape == (4, 4)
    pixels = learnt.image_tower.preprocessing.decode(picture)[None]
    with torch.no_grad():
        expected = detect(learnt.regions(pixels), learnt.encode_texts(["狗", "a cat"]))[0]
    for found, right in zip((one, other), expected, strict=True):
        assert found.score == pytest.approx(float(right.scores[0]), abs=1e-6)
        np.testing.assert_allclose([r.score for r in found.boxes], right.scores[:10], atol=1e-6)
    ((few,),) = finder.ground(learnt, [picture], ["狗"], threshold=1)
    for most in (0, -1):
        with pytest.raises(RequestError, match=f"the most boxes of a phrase are {most}; at least 1"):
            finder.ground(learnt, [picture], ["狗"], most=most)
    with pytest.raises(RequestError, match="phrases are text, 1 is int"):
        finder.ground(learnt, [picture], [1])
    assert len(few.boxes) == 1
    ((plain,),) = finder.ground(learnt, [picture], ["狗"], method="maskclip")
    assert not plain.learnt
    with pytest.raises(RequestError, match="has not learnt boxes"):
        next(finder.ground(tiny_model().eval(), [picture], ["狗"], method="learnt"))


def test_judged_along_is_as_judged_afterwards(learnt, tmp_path):
    store = open_store(write_boxes(tmp_path / "boxes", pictures=9, seed=3))
    along, _ = BoxesFound("held", BoxesSplit(boxes=str(store.path))).judge("held", SharedEncoder(learnt, batch_size=4))
    held = read_boxed(store, "here")
    judged = []
    for image_id, picture in held.pictures.items():
        phrases = [held.texts[number] for number in picture.phrases]
        (found,) = finder.ground(learnt, [store.image(image_id)], phrases, threshold=0, most=50)
        for place, one in enumerate(found):
            true = picture.boxes[picture.says[:, place]].tolist()
            judged.append(judge(one.boxes, one.hottest, true, merged_found=one.merged))
    expected = scores(judged)
    assert along.phrases == expected.phrases == len(judged)
    for k in (1, 5, 10):
        assert along.found[f"any_box_r{k}"] == pytest.approx(expected.any_box[k], abs=1e-3)
        assert along.found[f"merged_box_r{k}"] == pytest.approx(expected.merged_box[k], abs=1e-3)
    assert along.found["pointing"] == pytest.approx(expected.pointing, abs=1e-3)
    nothing, _ = BoxesFound("held", BoxesSplit(boxes=str(store.path))).judge("held", SharedEncoder(tiny_model().eval()))
    assert set(nothing.found.values()) == {0.0}


def test_a_tower_that_sees_the_middle_learns_what_lies_there(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (80, 40)).save(file, "PNG")
    with StoreWriter(tmp_path / "wide") as writer:
        writer.add_image(1, file.getvalue())
        for number, (text, box) in enumerate(
            (("middle", [0.375, 0.25, 0.25, 0.5]), ("edge", [0.2, 0.0, 0.2, 1.0]), ("gone", [0.0, 0.0, 0.2, 0.2]))
        ):
            writer.add_pair(1, number, text, "en", beside={"boxes": [box]})
        writer.finish()
    store, model = open_store(tmp_path / "wide"), tiny_model()
    crop = SquarePicture(32, fit="crop")
    assert part_of(crop, store, 1) == pytest.approx((0.25, 0.0, 0.5, 1.0))
    assert part_of(SquarePicture(32), store, 1) == (0.0, 0.0, 1.0, 1.0)
    (picture,) = build_box_table(store, model.tokenizer, crop, "here").pictures
    np.testing.assert_allclose(picture.boxes, [[0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 0.3, 1.0]], atol=1e-6)
    assert len(picture.phrases) == 2  # what lies outside is neither said nor denied
