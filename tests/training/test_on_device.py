"""Training on every device there may be: each place where a device computes differently from the CPU, beside the CPU."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext

import pytest
import torch

from cnclip_ft.data.augment import augment
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.recipe import Augmentation
from cnclip_ft.training.large_batch import GradientStep
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import give_bias
from cnclip_ft.training.run import train
from cnclip_ft.training.trainer import Trainer
from cnclip_ft.training.validation import Judge
from data_tools.errors import UserError
from tests.training.helpers import (
    losses,
    prepared,
    random_batch,
    records,
    stopped_after,
    tiny_model,
    tiny_recipe,
    write_store,
)
from tests.training.test_loss import brute_info_nce, features

NO_DROPOUT = {
    "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0},
    "projection": 16,
}


@pytest.fixture
def deterministic():
    """The same bits every time, on a GPU too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ready(stores, tmp_path, number: int = 1, **changes) -> Trainer:
    """A stage ready for its first step; nothing was judged."""
    recipe = tiny_recipe(stores, output=str(tmp_path / "run"), feature_cache=str(tmp_path / "cache"), **changes)
    return prepared(recipe, number)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}


# ---- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", ["exclude", "soft", "ignore"])
@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_tiled_loss_equals_brute_force_in_float64(device, positives, dtype, near):
    n = 77
    x, y = features(n)
    image_keys, text_keys = torch.arange(n) // 2, torch.arange(n) % (n - 3)
    scale = torch.tensor(math.log(50.0), dtype=torch.float64, requires_grad=True)
    expected = brute_info_nce(x, y, scale, image_keys, text_keys, positives, 0.1)
    wanted = torch.autograd.grad(expected, [x, y, scale])
    placed = [t.detach().to(device, dtype).requires_grad_() for t in (x, y, scale)]
    keys = image_keys.to(device), text_keys.to(device)
    out = ContrastiveObjective(positives, 0.1, tile=16)(*placed, *keys)
    assert out.loss.device.type == device.type and out.loss.item() == pytest.approx(expected.item(), abs=near)
    for found, right in zip(torch.autograd.grad(out.loss, placed), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), right, atol=near, rtol=near)


# ---- one step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ContrastiveObjective, SigmoidObjective])
def test_a_divided_batch_replays_dropout_and_patch_dropping(device, objective):
    """Two divisions of the same batch into the same chunks, and all chunks kept alive at once: the same random numbers."""
    model = tiny_model(dropout=0.1).double().to(device)
    give_bias(model, objective())
    model.train()
    model.image_tower.patch_dropout = 0.5
    batch, goal = random_batch(model, 12), objective(tile=5)
    batch |= {name: batch[name].to(device) for name in ("image_keys", "text_keys")}
    torch.manual_seed(5)
    parts = []
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        longest = int(batch["attention_mask"][rows].sum(1).max())
        parts.append(model(batch["pixels"][rows].to(device), batch["input_ids"][rows, :longest].to(device),
                           batch["attention_mask"][rows, :longest].to(device)))  # fmt: skip
    images, texts = (torch.cat(side) for side in zip(*parts, strict=True))
    whole = goal(images, texts, model.logit_scale, batch["image_keys"], batch["text_keys"], model.logit_bias)
    whole.loss.backward()
    expected, after = gradients(model), torch.rand(3, device=device)
    model.zero_grad()
    torch.manual_seed(5)
    step = GradientStep(model, goal, micro_batch_size=4, autocast=nullcontext, backward=lambda loss: loss.backward())
    divided = step(batch)
    torch.testing.assert_close(divided.loss, whole.loss.detach(), atol=1e-12, rtol=0)
    assert torch.equal(
        torch.rand(3, device=device), after
    )  # the device's generator goes on as if nothing were replayed
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 30
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-6, msg=name)


def test_a_step_in_bf16_is_near_the_step_in_float32(device, stores, tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = ready(stores, tmp_path, model={"start": NO_DROPOUT}, precision=precision)
        assert trainer.context.device.type == device.type and trainer.context.precision == precision
        out = trainer.take(next(trainer.batches()))
        found[precision] = out.loss.item()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.03)
    assert found["bf16"] != found["fp32"]  # it was computed in bf16


def test_loss_scaling_skips_an_overflow_and_goes_on(device, stores, tmp_path):
    """fp16's scaler: a step whose gradient overflows changes nothing and halves the scale; the next one trains."""
    precision = "fp16" if device.type == "cuda" else "fp32"
    trainer = ready(stores, tmp_path, precision=precision)
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127, growth_interval=1000)
    batch = next(trainer.batches())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.take(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**126 and trainer.skipped == 0
    trainer.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    trainer.take(batch)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 1024.0


def test_the_optimizer_is_fused_and_equals_the_cpu_in_float64(device, stores, tmp_path):
    trainer = ready(stores, tmp_path)
    assert trainer.optimizer.defaults["fused"]
    groups = [{"params": [p.detach().cpu().double().clone().requires_grad_() for p in group["params"]],
               "lr": group["lr"], "weight_decay": group["weight_decay"]} for group in trainer.optimizer.param_groups]  # fmt: skip
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


def test_augmentation_draws_the_same_on_every_device(device):
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    setting = Augmentation(crop=0.5, colour=0.3, mirror=True, operations=2)
    expected = augment(pixels, setting, torch.Generator().manual_seed(7))
    found = augment(pixels.to(device), setting, torch.Generator().manual_seed(7)).cpu()
    away = (found.int() - expected.int()).abs()
    assert (expected != pixels).any() and away.float().mean() < 0.5 and (away <= 2).float().mean() > 0.99


# ---- towers -----------------------------------------------------------------------------------------------------


def resnet():
    return tiny_model(image={"kind": "resnet", "layers": [1, 1, 1, 1], "width": 16, "heads": 2, "image_size": 64})


def test_a_resnet_gives_the_cpu_s_features(device):
    model = resnet().eval()
    pixels = random_batch(model, 3)["pixels"]
    with torch.no_grad():
        expected = model.double().image_features(pixels)
        found = model.float().to(device).image_features(pixels.to(device))
        last = model.to(memory_format=torch.channels_last).image_features(pixels.to(device))
    for features_ in (found, last):
        torch.testing.assert_close(features_.cpu().double(), expected, atol=2e-3, rtol=0)


def test_statistics_shared_over_devices_equal_those_of_one(device):
    model = resnet().to(device)
    model.train()
    pixels = random_batch(model, 4)["pixels"].to(device)
    expected = model.image_features(pixels).detach()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shared = resnet().to(device)
    if device.type == "cuda":  # the CPU has none
        shared.image_tower = torch.nn.SyncBatchNorm.convert_sync_batchnorm(shared.image_tower)
    shared.train()
    torch.testing.assert_close(shared.image_features(pixels).detach(), expected, atol=1e-4, rtol=1e-4)
    for name, buffer in shared.named_buffers():
        torch.testing.assert_close(buffer, statistics[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, there is no g++")
def test_compiled_towers_step_like_plain_ones(device, stores, tmp_path):
    found = []
    for compiled in (False, True):
        trainer = ready(stores, tmp_path / str(compiled), model={"start": NO_DROPOUT}, compile=compiled)
        batches = trainer.batches()
        found.append([])
        for _ in range(3):
            found[-1].append(trainer.take(next(batches)).loss.item())
    assert found[1] == pytest.approx(found[0], abs=1e-3)


# ---- whole runs -------------------------------------------------------------------------------------------------


def test_the_feature_cache_holds_what_the_trunk_gives(device, stores, tmp_path):
    trainer = ready(stores, tmp_path, number=0, precision="fp32")
    assert trainer.plan.cached
    keys = torch.tensor([3, 0, 19])
    store, preprocessing = trainer.context.train_store, trainer.model.image_tower.preprocessing
    pixels = torch.stack([preprocessing.decode(store.image(store.image_ids[key])) for key in keys])
    with torch.inference_mode():
        expected = trainer.model.image_trunk(pixels.to(device)).float().cpu()
    torch.testing.assert_close(trainer.cache.rows(keys, 0).float().cpu(), expected, atol=2e-4, rtol=1e-3)


def test_a_run_with_workers_pins_its_batches_and_learns(device, stores, tmp_path):
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 2}
    recipe = tiny_recipe(
        stores, output=str(tmp_path / "run"), feature_cache=str(tmp_path / "cache"), data=data,
        align={"feature_cache": False, "steps": 3, "validate_every": 3}, contrast={"steps": 3, "validate_every": 3},
    )  # fmt: skip
    assert train(recipe)
    found = losses(tmp_path / "run")
    assert len(found) == 6 and all(math.isfinite(loss) for loss in found.values())
    memory = [record.get("memory_gib") for record in records(tmp_path / "run")]
    assert all((value is not None) == (device.type == "cuda") for value in memory)


def test_a_stopped_run_continues_to_the_very_bits(device, deterministic, stores, tmp_path, monkeypatch):
    def recipe(name):
        return tiny_recipe(stores, output=str(tmp_path / name), feature_cache=str(tmp_path / "cache"), precision="bf16")

    assert train(recipe("whole"))
    assert not train(recipe("parts"), **stopped_after(("contrast", 2)))
    if device.type == "cpu":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert train(recipe("parts"), proceed=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = (load(tmp_path / name / "contrast" / "last").state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_this_device_is_the_cpu_s(device, stores, tmp_path):
    """Written on the device, read and used on the CPU and on the device; validation gives both the same recall."""
    trainer = ready(stores, tmp_path, precision="fp32")
    save_checkpoint(trainer.whole, tmp_path / "saved", info={})
    there, here = load(tmp_path / "saved").to(device), load(tmp_path / "saved")
    assert here.device.type == "cpu"
    texts = ["一只猫", "山和水", "a red dog"]
    torch.testing.assert_close(there.encode_texts(texts).cpu(), here.encode_texts(texts), atol=1e-4, rtol=0)
    context = trainer.context
    judged = Judge(context.evaluators, context.device, 0, context.autocast)(there).scores["valid"]
    assert 0 <= judged.mean_recall <= 100
    again = Judge(context.evaluators, torch.device("cpu"), 0, nullcontext)(here)
    assert judged.mean_recall == pytest.approx(again.mean_recall, abs=5.1)  # one of 20 queries may tie


# ---- what only a GPU has ----------------------------------------------------------------------------------------

LARGE = {
    "image": {"kind": "vit", "hidden": 256, "layers": 6, "heads": 4, "patch": 8, "image_size": 96},
    "text": {"hidden": 256, "layers": 4, "heads": 4, "dropout": 0.0},
    "projection": 64,
}


@pytest.fixture
def little_memory(device, tmp_path_factory):
    """A store of 256 pairs, and a GPU of which 1.2 GiB may be used."""
    if device.type != "cuda":
        pytest.skip("a CPU has no memory of its own to run out of")
    folder = tmp_path_factory.mktemp("many")
    for name in ("train", "valid"):
        write_store(folder / name, images=256, captions=1, seed=0)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield folder
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def run_of(folder, tmp_path, micro):
    stage = {"batch_size": 256, "steps": 2, "validate_every": 2, "micro_batch_size": micro}
    return tiny_recipe(folder, output=str(tmp_path / f"run-{micro}"), feature_cache=str(tmp_path / "cache"), precision="fp32",
                       model={"start": LARGE}, align={"steps": 1, "warmup_steps": 0, "validate_every": 1}, contrast=stage)  # fmt: skip


def test_out_of_memory_is_told_with_a_size_that_fits(little_memory, tmp_path):
    with pytest.raises(
        UserError, match=r"out of memory on cuda.*micro_batch_size: \d+ \(fits, tried just now; same gradient"
    ):
        train(run_of(little_memory, tmp_path, None))


def test_an_automatic_micro_batch_fits_and_trains(little_memory, tmp_path):
    assert train(run_of(little_memory, tmp_path, "auto"))
    said = (tmp_path / "run-auto" / "journal.jsonl").read_text(encoding="utf-8")
    assert len(losses(tmp_path / "run-auto")) == 3, said
