"""A divided batch gives the gradient of the undivided one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import give_bias
from data_tools.errors import RequestError
from tests.training.helpers import random_batch, tiny_model


def step(model, objective, micro):
    return GradientStep(
        model, objective, micro_batch_size=micro, autocast=nullcontext, backward=lambda loss: loss.backward()
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", [ContrastiveObjective(tile=5), SigmoidObjective(tile=5)])
@pytest.mark.parametrize("micro", [1, 3, 6, 12])
def test_without_dropout_equal_to_one_forward(objective, micro):
    model = tiny_model(dropout=0.0).double()
    give_bias(model, objective)
    batch = random_batch(model, 12)
    whole = step(model, objective, None)(batch)
    expected = gradients(model)
    model.zero_grad()
    parts = step(model, objective, micro)(batch)
    assert torch.allclose(whole.loss, parts.loss, atol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-6, msg=name)


def test_dropout_and_patch_dropping_are_replayed():
    """Against all chunks kept alive at once: same random numbers, one backward through everything."""
    model = tiny_model(dropout=0.1).double()
    model.train()
    model.image_tower.patch_dropout = 0.5
    batch, objective, micro = random_batch(model, 12), ContrastiveObjective(), 4
    runner = step(model, objective, micro)

    torch.manual_seed(5)
    images, texts = [], []
    for start in range(0, 12, micro):
        rows = slice(start, start + micro)
        longest = int(batch["attention_mask"][rows].sum(1).max())
        image, text = model(
            batch["pixels"][rows], batch["input_ids"][rows, :longest], batch["attention_mask"][rows, :longest]
        )
        images.append(image)
        texts.append(text)
    out = objective(torch.cat(images), torch.cat(texts), model.logit_scale, batch["image_keys"], batch["text_keys"])
    out.loss.backward()
    expected, after = gradients(model), torch.rand(3)
    model.zero_grad()

    torch.manual_seed(5)
    divided = runner(batch)
    assert torch.equal(divided.loss, out.loss.detach())  # bit-equal masks
    assert torch.equal(torch.rand(3), after)  # and the generator goes on as if nothing had been replayed
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-6, msg=name)


@pytest.mark.parametrize("several", [False, True])
def test_a_frozen_text_tower_is_asked_once(several, monkeypatch):
    """A quarter of the work where a picture has many captions; the gradient stays, with pictures that draw at random."""
    model = tiny_model(dropout=0.1).double()
    model.train()
    model.text_tower.eval().requires_grad_(False)
    model.image_tower.patch_dropout = 0.5
    batch, asked, read = random_batch(model, 12), [], model.text_features
    if several:
        others = torch.arange(12).roll(1)
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([batch[name], batch[name][others]], 1)
        batch["text_keys"] = torch.stack([batch["text_keys"], batch["text_keys"][others]], 1)

    def counted(ids, mask):
        asked.append(len(ids))
        return read(ids, mask)

    found = []
    for text_trains in (True, False):  # a projection that trains: every chunk is walked whole in the backward
        model.text_tower.text_projection.requires_grad_(text_trains)
        monkeypatch.setattr(model, "text_features", counted)
        asked.clear()
        model.zero_grad()
        torch.manual_seed(5)
        step(model, ContrastiveObjective(), 4)(batch)
        monkeypatch.undo()
        assert sum(asked) == 12 * (1 + several) * (1 + text_trains)
        found.append(gradients(model))
    before, after = found
    assert before.keys() - after.keys() == {"text_tower.text_projection.weight"}
    for name, gradient in after.items():
        assert torch.equal(gradient, before[name]), name


def test_patch_dropping_drops_in_training_only():
    model = tiny_model()
    pixels = random_batch(model, 2)["pixels"]
    model.image_tower.patch_dropout = 0.5
    model.eval()
    first = model.image_features(pixels)
    assert torch.equal(first, model.image_features(pixels))
    model.train()
    assert not torch.equal(model.image_features(pixels), model.image_features(pixels))


def test_batch_norm_in_training_mode_is_refused_with_the_way_out():
    image = {"kind": "resnet", "layers": [1, 1], "width": 8, "heads": 2, "image_size": 32}
    model = tiny_model(image=image)
    model.train()
    with pytest.raises(RequestError, match="batch_norm=frozen"):
        step(model, ContrastiveObjective(), 4)
    model.image_tower.eval()
    step(model, ContrastiveObjective(), 4)(random_batch(model, 8))
    assert model.logit_scale.grad is not None


def test_a_frozen_tower_gets_no_gradient():
    model = tiny_model()
    model.image_tower.requires_grad_(False)
    step(model, ContrastiveObjective(), 4)(random_batch(model, 8))
    named = gradients(model)
    assert named and not any(name.startswith("image_tower") for name in named)
