"""One step on every device there may be: number formats, loss scaling, accumulation, dropping, compiled towers."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch
import torch._inductor

from cnclip_ft.training.compiling import compile_towers
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import give_bias
from tests.models.helpers import TEXT
from tests.training.helpers import random_batch, tiny_model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


ONE_LAYER = {
    "image": {"kind": "vit", "hidden": 32, "layers": 1, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 1, "heads": 2, "vocabulary": 21128, "dropout": 0.1},
}
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, there is no g++")


@pytest.mark.parametrize(
    "objective,compiled",
    [
        (ContrastiveObjective, False),
        (SigmoidObjective, False),
        pytest.param(ContrastiveObjective, True, marks=[pytest.mark.slow, COMPILER]),
    ],
)
def test_a_divided_batch_replays_dropout_and_patch_dropping(device, objective, compiled):
    """Two divisions of the same batch into the same chunks, and all chunks kept alive at once: the same random numbers.

    Compiled with as little as can be: a layer, a length of texts. In float32, as torch 2.11 compiles no attention in float64 for a CPU.
    """
    model = tiny_model(dropout=0.1, **(ONE_LAYER if compiled else {})).to(device)
    model = model if compiled else model.double()
    give_bias(model, objective())
    model.train()
    model.image_tower.patch_dropout = 0.5
    if compiled:
        compile_towers(model)
    batch, goal = random_batch(model, 12), objective(tile=5)
    if compiled:
        batch |= {
            "input_ids": batch["input_ids"].clamp(min=1),
            "attention_mask": torch.ones_like(batch["attention_mask"]),
        }
    torch.manual_seed(5)
    parts = []
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        longest = int(batch["attention_mask"][rows].sum(1).max())
        parts.append(
            model(
                batch["pixels"][rows].to(device),
                batch["input_ids"][rows, :longest].to(device),
                batch["attention_mask"][rows, :longest].to(device),
            )
        )
    images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
    whole = goal(images, texts, model.logit_scale, batch["image_keys"], batch["text_keys"], model.logit_bias)
    whole.loss.backward()
    expected, after = gradients(model), torch.rand(3, device=device)
    model.zero_grad()
    torch.manual_seed(5)
    step = GradientStep(model, goal, micro_batch_size=4, autocast=nullcontext, backward=lambda loss: loss.backward())
    divided = step(batch)
    torch.testing.assert_close(divided.loss, whole.loss.detach(), atol=1e-5 if compiled else 1e-12, rtol=0)
    # The device's generator goes on as if nothing were replayed.
    assert torch.equal(torch.rand(3, device=device), after)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 30
    for name, gradient in found.items():
        near = {"atol": 1e-5, "rtol": 1e-3} if compiled else {"atol": 1e-9, "rtol": 1e-6}
        torch.testing.assert_close(gradient, expected[name], **near, msg=name)


def test_a_step_in_bf16_is_near_the_step_in_float32(device, ready):
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = ready(precision=precision)
        assert trainer.context.device.type == device.type and trainer.context.precision == precision
        out = trainer.take(next(trainer.batches()))
        found[precision] = out.loss.item()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.03)
    assert found["bf16"] != found["fp32"]  # it was computed in bf16


def test_loss_scaling_skips_an_overflow_and_goes_on(device, ready):
    """fp16's scaler: a step whose gradient overflows changes nothing and halves the scale; the next one trains."""
    trainer = ready(precision="fp16" if device.type == "cuda" else "fp32")
    scaler = trainer.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127, growth_interval=1000)
    trainer.gradient.backward = lambda loss: scaler.scale(loss).backward()
    batch = next(trainer.batches())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.take(dict(batch))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**126 and trainer.skipped == 0
    smaller = trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    trainer.gradient.backward = lambda loss: smaller.scale(loss).backward()
    trainer.take(dict(batch))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 1024.0


def test_patches_are_dropped_and_the_stage_learns(device, ready):
    """The same batch again and again; the last steps see all patches."""
    trainer = ready(stage={"patch_dropout": 0.5, "unmasked_steps": 2, "steps": 6, "learning_rate": 1e-3})
    seen = []
    trainer.model.image_tower.vision_model.encoder.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = next(trainer.batches())
    losses = [trainer.take(dict(batch)).loss.item() for _ in range(6)]
    patches = seen[-1] - 1
    assert seen == [1 + patches // 2] * 4 + [1 + patches] * 2
    assert losses[-1] < losses[0]


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("how", [True, "max-autotune"])
def test_compiled_towers_step_like_plain_ones(device, ready, monkeypatch, how):
    """With max-autotune of tiny towers, and without the search among torch's kernels, which takes minutes: the table for a card has all of it."""
    precision, layers = "bf16" if device.type == "cuda" else "fp32", 1 if how is True else 0
    modes = torch._inductor.list_mode_options
    little = {
        "coordinate_descent_tuning": False,
        "max_autotune_gemm_backends": "ATEN",
        "max_autotune_conv_backends": "ATEN",
    }
    monkeypatch.setattr(torch._inductor, "list_mode_options", lambda *mode: modes(*mode) | little)
    found = []
    for compiled in (False, how):
        trainer = ready(compile=compiled, precision=precision, layers=layers)
        batches = trainer.batches()
        found.append([trainer.take(next(batches)).loss.item() for _ in range(3)])
    assert found[1] == pytest.approx(found[0], abs=1e-3 if precision == "fp32" else 0.05)


def test_kept_texts_and_crops_of_a_size_of_their_own_step_as_on_the_cpu(device, ready, elsewhere):
    """A frozen text tower's features come from the host, several a picture; a convolution tower sees crops smaller than its pictures."""
    stage = {
        "train": [{"tower": "image"}, {"tower": "text", "rate": 0}, {"tower": "temperature"}],
        "captions_at_once": 2,
        "micro_batch_size": 3,
        "batch_norm": "frozen",
        "augment": {"crop": 0.5, "mirror": True, "size": 16},
    }
    start = {"image": "tests.models.tower_fixture:Any", "text": TEXT, "projection": 32}
    found = {}
    for kind in ("cpu", device.type):
        elsewhere(kind)
        trainer = ready(stage=stage, start=start, precision="fp32", layers=0)
        assert trainer.context.device.type == kind and trainer.prepared.texts is not None
        batches = trainer.batches()
        found[kind] = [trainer.take(next(batches)).loss.item() for _ in range(3)]
        assert trainer.whole.image_tower.module.seen.shape[-1] == 16
    assert found[device.type] == pytest.approx(found["cpu"], abs=2e-3)
    assert len(set(found["cpu"])) == 3
