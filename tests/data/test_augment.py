"""Augmentation: shapes, ranges, draws that do not depend on the batch's place, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cnclip_ft.data.augment import augment
from cnclip_ft.data.auto_augment import OPERATIONS as POLICY_OPERATIONS
from cnclip_ft.data.rand_augment import OPERATIONS, rand_augment
from cnclip_ft.recipe_stage import Augmentation


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


@pytest.mark.parametrize("more", [{}, {"mirror": True, "colour": 0.3, "operations": 1}])
def test_crops_of_another_size_show_the_same(more):
    """What is drawn does not depend on the size; the pixels are those of the crop in full, made smaller."""
    ramps = pictures(4, 32).float()
    ramps[:, 1] = ramps[:, 2].mT  # a straight line between pixels, so that any resampling of it is exact
    x = ramps[:, [2, 1, 2]].to(torch.uint8)
    full, small = (
        augment(x, Augmentation(crop=0.3, size=size, **more), torch.Generator().manual_seed(3)) for size in (None, 16)
    )
    assert small.shape == (4, 3, 16, 16) and small.dtype == torch.uint8
    if not more:
        halves = F.avg_pool2d(full.float(), 2)
        torch.testing.assert_close(small.float()[..., 1:-1, 1:-1], halves[..., 1:-1, 1:-1], atol=1.5, rtol=0)
        assert halves.std() > 10


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


# Of torch's list for `use_deterministic_algorithms`, what may be met in a forward: on a card these give other bits every time, and
# are done another way, or refused, where the same bits were asked for. `cumsum` of floats is on it.
NOT_DETERMINISTIC = {
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add", "index_add_", "index_copy", "index_copy_", "histc",
    "bincount", "kthvalue", "median", "mode", "put_", "histogram", "_unique2", "cumsum", "cumprod", "logcumsumexp", "resize_",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Names of what is called, as far as other bits may come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, self.count = func.__name__.partition(".")[0], self.count + 1
        sums = name in ("index_put", "index_put_", "_index_put_impl_") and (kwargs or {}).get(
            "accumulate", len(args) > 3 and args[3]
        )
        if sums or (name in NOT_DETERMINISTIC and not (name == "cumsum" and not args[0].is_floating_point())):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_gives_other_bits_on_a_card(name):
    with Operators() as seen:
        OPERATIONS[name](pictures(2).float(), torch.tensor([0.4, -0.7]))
    assert not seen.found and seen.count > 2


@pytest.mark.parametrize("name", POLICY_OPERATIONS)
def test_no_operation_of_the_policy_gives_other_bits_on_a_card(name):
    with Operators() as seen:
        POLICY_OPERATIONS[name](pictures(2), 4.0 if name in ("posterise", "rotate") else 0.3, (124, 116, 104))
    assert not seen.found and seen.count > 0


def test_augmentation_gives_the_same_bits_on_a_card():
    everything = Augmentation(crop=0.5, colour=0.3, mirror=True, operations=3)
    with Operators() as seen:
        augment(pictures(40), everything)
    assert not seen.found
    with Operators() as seen:  # it would have been seen
        torch.zeros(3).scatter_add_(0, torch.tensor([0, 0]), torch.ones(2)).cumsum(0)
        torch.zeros(3).index_put_((torch.tensor([1, 1]),), torch.ones(2), accumulate=True)
    assert seen.found == {"scatter_add_", "cumsum", "index_put_"}


def test_equalised_levels_are_places_in_the_order():
    """Of every pixel: those darker, and half of those that are as dark."""
    x = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    found = OPERATIONS["equalise"](x, torch.zeros(2))
    for row, out in zip(x.flatten(0, 1).flatten(1), found.flatten(0, 1).flatten(1), strict=True):
        places = [(row < value).sum() + (row == value).sum() / 2 for value in row]
        torch.testing.assert_close(out, torch.stack(places) * (255 / 64), rtol=0, atol=1e-4)
