"""Augmentation: shapes, ranges, draws that do not depend on the batch's place, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.data.augment import augment
from cnclip_ft.data.rand_augment import OPERATIONS, rand_augment
from cnclip_ft.recipe import Augmentation


def pictures(n: int = 6, size: int = 32) -> torch.Tensor:
    """Smooth gradients with a bright square to the left, so that a mirrored picture is told from an upright one."""
    x = torch.linspace(20, 120, size).repeat(n, 3, size, 1)
    x[:, 0, size // 4 : size // 2, 2 : size // 4] = 250
    return x.round().to(torch.uint8)


def test_nothing_asked_for_changes_nothing():
    x = pictures()
    assert augment(x, Augmentation()) is x


@pytest.mark.parametrize(
    "setting", [{"crop": 0.5}, {"colour": 0.5}, {"operations": 2}, {"crop": 0.7, "operations": 3, "strength": 1.0}]
)
def test_the_generator_decides_and_pictures_differ(setting):
    x, setting = pictures(), Augmentation(**setting)
    first, again, other = (augment(x, setting, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.uint8 and first.shape == x.shape
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert any(not torch.equal(first[0], row) for row in first[1:])  # every picture is drawn on its own


@pytest.mark.parametrize("setting", [{"crop": 0.6}, {"operations": 4, "strength": 0.3}, {"colour": 0.9}])
def test_nothing_is_mirrored_unless_asked_for(setting):
    """The bright square stays in the left half; with `mirror` it is found in the right half too."""

    def right(x: torch.Tensor) -> torch.Tensor:
        red = x[:, 0].float() - x[:, 2].float()  # only the square is red
        return red[:, :, 20:].clamp(min=0).sum((1, 2)) > red[:, :, :20].clamp(min=0).sum((1, 2))

    x = pictures(64)
    assert not right(augment(x, Augmentation(**setting), torch.Generator().manual_seed(0))).any()
    assert 10 < right(augment(x, Augmentation(mirror=True), torch.Generator().manual_seed(0))).sum() < 54


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_stays_in_range_and_does_something(name):
    x = pictures(4).float() * 0.8 + 5
    for amount in (-1.0, 1.0):
        out = OPERATIONS[name](x, torch.full((4,), amount))
        assert out.shape == x.shape and torch.isfinite(out).all()
        assert (out.clamp(0, 255) - x).abs().mean() > 0.3
    if name not in ("posterise", "autocontrast", "equalise"):
        torch.testing.assert_close(OPERATIONS[name](x, torch.zeros(4)), x, atol=2e-3, rtol=0)  # no strength, no change


def test_a_picture_is_treated_alike_whatever_stands_beside_it():
    x = pictures(5)
    x[3] = torch.randint(0, 256, x[3].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0] = 0
    one, two = (rand_augment(batch, 3, 0.5, torch.Generator().manual_seed(4)) for batch in (x, changed))
    assert torch.equal(one[1:], two[1:])


def test_equalised_levels_are_spread():
    x = torch.randint(100, 140, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    out = OPERATIONS["equalise"](x, torch.zeros(1))
    assert out.min() < 10 and out.max() > 245 and abs(out.mean().item() - 127.5) < 1
    assert out.std() > x.std() * 4
