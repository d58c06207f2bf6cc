"""Layers without the work nobody looks at: features and gradients are those of transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer

from cnclip_ft.models.families.chinese_clip.layers import ReadingTextLayer, ReadingVisionLayer, TextLayer
from cnclip_ft.models.families.packing import Packing
from cnclip_ft.models.start import build_start
from tests.models.helpers import TEXT, VIT, pixels, small

IDS = torch.tensor([[101, 2207, 3000, 3001, 102], [101, 2208, 102, 0, 0], [101, 102, 0, 0, 0]])
PADDED, FULL = (IDS != 0).long(), torch.ones_like(IDS)


def layers(model):
    return list(model.image_tower.vision_model.encoder.layers), list(model.text_tower.text_model.encoder.layer)


def plain(model):
    """A copy with transformers' own layers."""
    other = copy.deepcopy(model)
    for own, kind in zip(layers(other), (ChineseCLIPVisionLayer, ChineseCLIPTextLayer), strict=True):
        for layer in own:
            layer.__class__ = kind
    return other


def out_and_gradients(model, mask):
    image = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1)).double()
    image, text = model.image_tower(image), model.text_tower(IDS, mask)
    (image.sin().sum() + text.cos().sum()).backward()
    return image, text, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=["packed", "padded"])
def road(request, monkeypatch):
    """Padded is the road of every other device, and of a compiled tower."""
    if request.param == "padded":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


@pytest.mark.parametrize("mask", [PADDED, FULL])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_features_and_gradients_are_those_of_the_plain_layers(kernel, pooling, mask, road, monkeypatch):
    model = small(VIT | {"pooling": pooling}).double().eval()
    for tower in (model.image_tower.vision_model, model.text_tower.text_model):
        tower.set_attn_implementation(kernel)
    image, text, found = out_and_gradients(model, mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    image_expected, text_expected, expected = out_and_gradients(plain(model), mask)
    torch.testing.assert_close(image, image_expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(text, text_expected, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-11, rtol=0, msg=name)


def test_what_leaves_the_layers(road):
    model, shapes = small(), []
    assert [type(layer) for layer in layers(model)[1]] == [TextLayer, ReadingTextLayer]
    for own in layers(model):
        for layer in own:
            layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:-1])))
    with torch.no_grad():
        model.image_features(pixels(model.image_size))
        model.text_tower(IDS, PADDED)
    patches = (32 // 8) ** 2 + 1
    assert shapes[:2] == [(3, patches), (3, 1)]
    assert shapes[2:] == ([(10,), (3,)] if road == "packed" else [(3, 5), (3, 1)])


def test_dropout_is_still_drawn_in_training(road):
    model = build_start(VIT | {"text": TEXT | {"dropout": 0.5}})[0].train()
    assert not torch.equal(model.text_tower(IDS, PADDED), model.text_tower(IDS, PADDED))


def test_mean_pooling_needs_every_token_of_the_last_layer():
    model = build_start(VIT | {"pooling": "mean"})[0]
    assert [type(layer) for layer in layers(model)[1]] == [TextLayer, TextLayer]
    assert type(layers(model)[0][-1]) is ReadingVisionLayer


def test_packing_there_and_back():
    packing = Packing.of(PADDED)
    tokens = torch.randn(10, 4)
    assert torch.equal(packing.gather(packing.spread(tokens)), tokens)
    assert packing.starts.tolist() == [0, 5, 8] and packing.spread(tokens)[2, 2:].abs().sum() == 0
    assert Packing.of(FULL).mask is None
