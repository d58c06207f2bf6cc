"""The last layer reading the first token alone: features and gradients are those of the whole layer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextLayer, ChineseCLIPVisionLayer

from cnclip_ft.models.last_layer import ReadingTextLayer, ReadingVisionLayer
from cnclip_ft.models.start import build_start
from tests.models.helpers import TEXT, VIT, pixels, small

IDS = torch.tensor([[101, 2207, 3000, 3001, 102], [101, 2208, 102, 0, 0]])
WHOLE = {ReadingVisionLayer: ChineseCLIPVisionLayer, ReadingTextLayer: ChineseCLIPTextLayer}


def last_layers(model):
    return model.image_tower.vision_model.encoder.layers[-1], model.text_tower.text_model.encoder.layer[-1]


def whole(model):
    """A copy whose last layers compute every token."""
    other = copy.deepcopy(model)
    for layer in last_layers(other):
        layer.__class__ = WHOLE[type(layer)]
    return other


def out_and_gradients(model, mask):
    image = torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1)).double()
    image, text = model.image_tower(image), model.text_tower(IDS, mask)
    (image.sin().sum() + text.cos().sum()).backward()
    return image, text, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", [(IDS != 0).long(), torch.ones_like(IDS)])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_features_and_gradients_are_those_of_the_whole_layer(kernel, mask):
    model = small().double().eval()
    assert [type(layer) for layer in last_layers(model)] == list(WHOLE)
    for tower in (model.image_tower.vision_model, model.text_tower.text_model):
        tower.set_attn_implementation(kernel)
    image, text, found = out_and_gradients(model, mask)
    image_expected, text_expected, expected = out_and_gradients(whole(model), mask)
    torch.testing.assert_close(image, image_expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(text, text_expected, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-11, rtol=0, msg=name)


def test_only_one_token_leaves_the_last_layer():
    model = small()
    shapes = []
    for layer in last_layers(model):
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    with torch.no_grad():
        model.image_features(pixels(model.image_size))
        model.text_tower(IDS, (IDS != 0).long())
    assert shapes == [(len(pixels(model.image_size)), 1), (2, 1)]


def test_dropout_is_still_drawn_in_training():
    model = build_start(VIT | {"text": TEXT | {"dropout": 0.5}})[0].train()
    mask = (IDS != 0).long()
    assert not torch.equal(model.text_tower(IDS, mask), model.text_tower(IDS, mask))


def test_mean_pooling_needs_every_token():
    model = build_start(VIT | {"pooling": "mean"})[0]
    assert type(model.text_tower.text_model.encoder.layer[-1]) is ChineseCLIPTextLayer
    assert type(model.image_tower.vision_model.encoder.layers[-1]) is ReadingVisionLayer
