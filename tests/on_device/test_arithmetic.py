"""Losses, optimizer and augmentation on every device there may be, beside float64 on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.data.augment import augment
from cnclip_ft.recipe_stage import Augmentation
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from tests.training.helpers import random_batch, tiny_model
from tests.training.test_loss import brute_info_nce, features

EXACT_OR_NEAR = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


def pairs(device: torch.device) -> int:
    return 77 if device.type == "cpu" else 1500


def keys_of(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n) // 2, torch.arange(n) % (n - 3)


@pytest.mark.parametrize("positives", ["exclude", "soft", "ignore"])
@pytest.mark.parametrize("dtype,near", EXACT_OR_NEAR)
def test_the_tiled_softmax_equals_brute_force_in_float64(device, positives, dtype, near):
    n = pairs(device)
    x, y = features(n)
    scale = torch.tensor(math.log(50.0), dtype=torch.float64, requires_grad=True)
    expected = brute_info_nce(x, y, scale, *keys_of(n), positives, 0.1)
    wanted = torch.autograd.grad(expected, [x, y, scale])
    placed = [t.detach().to(device, dtype).requires_grad_() for t in (x, y, scale)]
    out = ContrastiveObjective(positives, 0.1, tile=n // 5 + 1)(*placed, *keys_of(n))
    assert out.loss.device.type == device.type and out.loss.item() == pytest.approx(expected.item(), abs=near)
    for found, right in zip(torch.autograd.grad(out.loss, placed), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), right, atol=near, rtol=near)


@pytest.mark.parametrize("positives", ["exclude", "soft", "ignore"])
@pytest.mark.parametrize("dtype,near", EXACT_OR_NEAR)
def test_the_tiled_sigmoid_equals_brute_force_in_float64(device, positives, dtype, near):
    n = pairs(device)
    x, y = features(n, seed=3)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (math.log(10.0), -8.0))
    image_keys, text_keys = keys_of(n)
    same = (image_keys[:, None] == image_keys) | (text_keys[:, None] == text_keys)
    own = torch.eye(n, dtype=torch.bool)
    sign = torch.where(own, 1.0, -1.0).double()
    if positives != "ignore":
        sign[same & ~own] = 1.0 if positives == "soft" else 0.0
    expected = -(F.logsigmoid(sign * (scale.exp() * x @ y.T + bias)) * sign.abs()).sum() / n
    wanted = torch.autograd.grad(expected, [x, y, scale, bias])
    placed = [t.detach().to(device, dtype).requires_grad_() for t in (x, y, scale, bias)]
    out = SigmoidObjective(positives, tile=n // 5 + 1)(*placed[:3], image_keys, text_keys, placed[3])
    assert out.loss.device.type == device.type and out.loss.item() == pytest.approx(expected.item(), rel=near, abs=near)
    for found, right in zip(torch.autograd.grad(out.loss, placed), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), right, atol=near, rtol=max(near, 1e-7))


def test_the_optimizer_is_fused_and_equals_the_cpu_in_float64(device, ready):
    trainer = ready(layers=0)
    assert trainer.optimizer.defaults["fused"]
    groups = [
        {
            "params": [p.detach().cpu().double().clone().requires_grad_() for p in group["params"]],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        for group in trainer.optimizer.param_groups
    ]
    plain = torch.optim.AdamW(
        groups, betas=trainer.plan.setting.betas, eps=trainer.plan.setting.eps, foreach=False, fused=False
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(trainer.optimizer.param_groups, plain.param_groups, strict=True):
            for mine, other in zip(ours["params"], theirs["params"], strict=True):
                other.grad = torch.randn(other.shape, generator=generator, dtype=torch.float64)
                mine.grad = other.grad.to(mine.device, mine.dtype)
        trainer.optimizer.step()
        plain.step()
    for ours, theirs in zip(trainer.optimizer.param_groups, plain.param_groups, strict=True):
        for mine, other in zip(ours["params"], theirs["params"], strict=True):
            torch.testing.assert_close(mine.detach().cpu().double(), other.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [{"colour": 0.3, "crop": 0.5, "operations": 2}, {"crop": 0.9, "auto_augment": "original"}],
    ids=["random", "policy"],
)
def test_augmentation_draws_the_same_on_every_device(device, setting):
    count, side = (6, 32) if device.type == "cpu" else (64, 224)
    pixels = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    setting = Augmentation(mirror=True, **setting)
    expected = augment(pixels, setting, torch.Generator().manual_seed(7))
    found = augment(pixels.to(device), setting, torch.Generator().manual_seed(7)).cpu()
    away = (found.int() - expected.int()).abs()
    assert (expected != pixels).any() and away.float().mean() < 0.5 and (away <= 2).float().mean() > 0.99


def test_augmentation_gives_the_same_bits_every_time(device, deterministic):
    some, draws = random_batch(tiny_model(), 40)["pixels"].to(device), torch.Generator()
    for everything in (
        Augmentation(crop=0.5, colour=0.3, operations=3),
        Augmentation(crop=0.9, colour=0.3, auto_augment="original"),
    ):
        found = [augment(some, everything, draws.manual_seed(0)).cpu() for _ in range(3)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
