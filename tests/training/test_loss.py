"""The tiled objectives against a brute-force reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from data_tools.errors import UserError


def features(n: int, dim: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)  # noqa: E731
    return make().requires_grad_(), make().requires_grad_()


def brute_info_nce(x, y, log_scale, image_keys, text_keys, positives, smoothing):
    z = log_scale.exp() * x @ y.T
    n = len(x)
    own = torch.eye(n, dtype=torch.bool)
    same = (image_keys[:, None] == image_keys) | (text_keys[:, None] == text_keys) | own
    allowed = torch.ones_like(own) if positives != "exclude" else ~same | own
    target_set = same if positives == "soft" else own

    def direction(z, allowed, target_set):
        log_p = z.masked_fill(~allowed, -torch.inf).log_softmax(1)
        target, every = target_set.double(), allowed.double()
        share = (1 - smoothing) * target / target.sum(1, keepdim=True)
        share = share + smoothing * every / every.sum(1, keepdim=True)
        return -(share * log_p.masked_fill(~allowed, 0.0)).sum(1).mean()

    return (direction(z, allowed, target_set) + direction(z.T, allowed.T, target_set.T)) / 2


@pytest.mark.parametrize("n,tile", [(2, None), (7, 3), (16, 16), (33, 8)])
@pytest.mark.parametrize("positives", ["exclude", "soft", "ignore"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_info_nce_equals_brute_force(n, tile, positives, smoothing, scale):
    x, y = features(n)
    image_keys = torch.arange(n) // 2 if n > 2 else torch.arange(n)
    text_keys = torch.arange(n) % max(2, n - 3)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    ours = ContrastiveObjective(positives, smoothing, tile=tile)(x, y, log_scale, image_keys, text_keys)
    ours_grads = torch.autograd.grad(ours.loss * 3, [x, y, log_scale])
    theirs = brute_info_nce(x, y, log_scale, image_keys, text_keys, positives, smoothing)
    theirs_grads = torch.autograd.grad(theirs * 3, [x, y, log_scale])
    assert abs(ours.loss.item() - theirs.item()) < 1e-10
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_plain_info_nce_equals_cross_entropy():
    x, y = features(9)
    log_scale = torch.tensor(2.0, dtype=torch.float64)
    z = log_scale.exp() * x @ y.T
    labels = torch.arange(9)
    expected = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    loss, accuracy = ContrastiveObjective("ignore")(x, y, log_scale)
    assert abs(loss.item() - expected.item()) < 1e-12
    hits = (z.argmax(1) == labels).sum() + (z.argmax(0) == labels).sum()
    assert accuracy.item() == pytest.approx(hits.item() / 18)


@pytest.mark.parametrize("positives", ["exclude", "soft", "ignore"])
def test_sigmoid_equals_brute_force(positives):
    n = 11
    x, y = features(n, seed=3)
    image_keys, text_keys = torch.arange(n) // 2, torch.arange(n)
    log_scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    ours = SigmoidObjective(positives, tile=4)(x, y, log_scale, image_keys, text_keys, bias).loss
    inputs = [x, y, log_scale, bias]
    ours_grads = torch.autograd.grad(ours, inputs)
    z = log_scale.exp() * x @ y.T + bias
    same = (image_keys[:, None] == image_keys) | (text_keys[:, None] == text_keys)
    own = torch.eye(n)
    sign = 2 * own - 1
    if positives != "ignore":
        sign = torch.where(same & (own == 0), torch.full_like(sign, 1.0 if positives == "soft" else 0.0), sign)
    theirs = -(F.logsigmoid(sign * z) * (sign != 0)).sum() / n
    theirs_grads = torch.autograd.grad(theirs, inputs)
    assert abs(ours.item() - theirs.item()) < 1e-10
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_fp32_does_not_overflow_at_the_largest_temperature():
    x, y = (f.detach().float() for f in features(5))
    loss = ContrastiveObjective("ignore")(x, x, torch.tensor(math.log(100.0))).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(ContrastiveObjective("ignore")(x, -y, torch.tensor(math.log(100.0))).loss)


def test_half_precision_features_are_compared_in_fp32():
    x, y = (f.detach().float() for f in features(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ContrastiveObjective("ignore")(x, y, torch.tensor(4.0)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ContrastiveObjective("ignore")(x, y, torch.tensor(4.0)).loss)


def test_a_batch_without_negatives_is_refused_in_words():
    x, y = features(4)
    with pytest.raises(UserError, match="same image or carry the same text"):
        ContrastiveObjective()(x, y, torch.tensor(1.0), torch.zeros(4).long(), torch.arange(4))


def test_missing_ids_are_an_error_not_a_silent_default():
    x, y = features(4)
    with pytest.raises(ValueError, match="needs the image and text keys"):
        ContrastiveObjective("exclude")(x, y, torch.tensor(1.0))
