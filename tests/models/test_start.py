"""Where weights come from: what was loaded, made, changed and left over is said; anything else is refused."""

from __future__ import annotations

import math

import pytest
import torch

from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES
from cnclip_ft.models.start import LoadReport, build_start
from data_tools.errors import RequestError
from tests.models.helpers import RESNET, TEXT, VIT, equal, features, official, small, tensors


def test_a_checkpoint_of_any_kind(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    state = official(small()) | {"module.bert.pooler.dense.bias": torch.zeros(64)}
    torch.save({"state_dict": state}, tmp_path / "x.pt")
    for path, left_over in ((tmp_path / "a", []), (tmp_path / "x.pt", ["module.bert.pooler.dense.bias"])):
        model, report = build_start(str(path))
        assert model.training and equal(tensors(model), tensors(small()))
        assert report.loaded == [("both towers and temperature", str(path))]
        assert (report.new, report.changed, report.left_over) == ([], [], left_over)


def test_context_length_and_resolution(tmp_path):
    save_checkpoint(small(), tmp_path / "a", info={})
    model, report = build_start(str(tmp_path / "a"), context_length=100, image_size=64)
    assert (model.context_length, model.image_size) == (100, 64) and len(report.changed) == 1
    long = features(model, ["很长" * 60, "很长" * 40])
    assert long.shape == (5, 32) and not torch.equal(long[3], long[4])
    longer, report = build_start(str(tmp_path / "a"), context_length=513)
    assert longer.text_tower.max_length == 513 and "position embeddings stretched" in report.changed[0]
    for spec in (VIT, {"architecture": "tiny"}):
        with pytest.raises(RequestError, match="context_length is 513, but the text tower has 512 positions"):
            build_start(spec, context_length=513)


def test_random_weights_of_a_published_size():
    model, report = build_start({"architecture": "tiny"}, image_size=40)
    assert report.new == ["image_tower", "text_tower", "logit_scale"] and report.loaded == []
    assert model.image_size == 40 and model.architecture is None
    assert build_start({"architecture": "tiny"})[0].architecture == ARCHITECTURES["tiny"]
    assert math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)


@pytest.mark.parametrize("spec", [VIT, RESNET, {"architecture": "tiny"}])
def test_the_seed_decides_what_is_made(spec):
    first, again, other = (tensors(build_start(spec, seed=seed)[0]) for seed in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)


def test_own_temperature():
    model, report = build_start(VIT | {"logit_scale": 3.0})
    assert model.logit_scale.item() == 3.0 and "logit_scale" not in report.new
    assert any("logit_scale set to 3" in line for line in report.changed)


@pytest.mark.parametrize(
    "spec,message",
    [
        ({"architecture": "ViT-X"}, "'ViT-X' is not known; known: ViT-B-32"),
        ({"architecture": "tiny", "text": "x"}, "unknown key text"),
        ({"image": VIT["image"]}, "text is missing"),
        ({"text": TEXT}, "image is missing"),
        (VIT | {"pool": 1}, "unknown key pool"),
        (VIT | {"pooling": "max"}, "pooling is 'max': model.start.pooling=cls"),
        (VIT | {"logit_scale": 100}, "a logarithm between 0 and 4.605"),
        (
            VIT | {"image": {"kind": "cnn"}},
            "kind is 'cnn'; use model.start.image.kind=vit or model.start.image.kind=resnet",
        ),
        (VIT | {"image": VIT["image"] | {"depth": 3}}, "unexpected keyword argument 'depth'"),
        (VIT | {"image": VIT["image"] | {"image_size": 30}}, "30 is no multiple of 8"),
        (VIT | {"text": {"width": 3}}, "unexpected keyword argument 'width'"),
        (VIT | {"image": {"path": "x", "act": 1}}, "unknown key act"),
        (VIT | {"image": "no/such/folder/here"}, "no such file or folder"),
        ("no-such-name", "no published name"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(RequestError, match=message):
        build_start(spec)


def test_lines_say_it_all():
    report = LoadReport([("text tower", "x")], ["image_tower"], ["something"], ["a", "b", "c", "d", "e"])
    assert report.lines() == [
        "loaded   text tower from x",
        "new      image_tower (random)",
        "changed  something",
        "left     5 tensors not used: a, b, c, d, …",
    ]
