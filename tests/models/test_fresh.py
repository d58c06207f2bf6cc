"""Newly made towers: signals keep their scale, positions know their neighbours."""

from __future__ import annotations

import torch
from torch import nn

from cnclip_ft.models.families.fresh import POSITION_SCALE, keep_scale_, sine_positions_
from cnclip_ft.models.preprocessing import SquarePicture
from cnclip_ft.models.start import build_start
from data_tools.scenes import draw, sample_scenes


def test_what_passes_through_a_linear_layer_keeps_its_scale() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 32, bias=False))
    keep_scale_(layers)
    out = layers(torch.randn(4000, 64))
    assert 0.8 < out.std().item() < 1.25


def test_near_patches_have_like_positions_and_far_ones_do_not() -> None:
    embedding = nn.Embedding(1 + 36, 128)
    sine_positions_(embedding)
    assert embedding.weight[0].abs().max() == 0
    grid = embedding.weight[1:].detach().view(6, 6, 128)
    torch.testing.assert_close(grid[0, 0].norm(), torch.tensor(POSITION_SCALE * 64**0.5))

    def likeness(row: int, column: int) -> float:
        return torch.cosine_similarity(grid[0, 0], grid[row, column], dim=0).item()

    for there in ((lambda k: (0, k)), (lambda k: (k, 0))):
        assert 1 > likeness(*there(1)) > likeness(*there(2)) > likeness(*there(3))
    # A row is told from a column.
    assert torch.cosine_similarity(grid[0, 3], grid[3, 0], dim=0).item() < 0.9


def test_a_width_that_waves_do_not_fit_keeps_its_start() -> None:
    embedding = nn.Embedding(5, 6)
    before = embedding.weight.clone()
    sine_positions_(embedding)
    assert torch.equal(embedding.weight, before)


def test_new_towers_tell_pictures_and_texts_apart() -> None:
    vit = {"kind": "vit", "hidden": 64, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
    resnet = {"kind": "resnet", "layers": [1, 1, 1], "width": 16, "heads": 4, "image_size": 32}
    pixels = torch.stack([SquarePicture(32).decode(draw(scene, 32)) for scene in sample_scenes(16)])
    for image, bound in ((vit, 0.9), (resnet, 0.99)):
        model, _ = build_start({"image": image, "text": {"hidden": 64, "layers": 2, "heads": 2}, "projection": 32})
        with torch.inference_mode():
            pictures = model.eval().image_features(pixels)
            ids, mask = model.tokenizer.pad(model.tokenizer.encode(["红色的圆", "蓝色的圆", "三条鱼", "a house"]))
            texts = model.text_features(ids, mask)
        # Mean likeness with the libraries' defaults: pictures 0.944 (ViT) and 0.999 (ResNet), texts 0.9999.
        for features, most in ((pictures, bound), (texts, 0.98)):
            count = len(features)
            likeness = ((features @ features.T).sum() - count) / (count * (count - 1))
            assert likeness.item() < most
