"""Towers of every family on every device there may be, beside the CPU: the second family stands for all of them."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.modules._functions import SyncBatchNorm

from cnclip_ft.models.checkpoints import load
from cnclip_ft.models.start import build_start
from cnclip_ft.training import trainer as trainer_module
from cnclip_ft.training.trainer import Trainer
from tests.evaluation import tiny
from tests.families.cards import CARDS
from tests.families.test_families import photos
from tests.training.helpers import prepared, random_batch, tiny_model, tiny_recipe


def resnet(device: torch.device):
    """On a card with the layers of RN50."""
    layers, width, side = ([1, 1, 1, 1], 16, 64) if device.type == "cpu" else ([3, 4, 6, 3], 64, 224)
    return tiny_model(image={"kind": "resnet", "layers": layers, "width": width, "heads": 2, "image_size": side})


def test_a_resnet_gives_the_cpu_s_features_channels_last_too(device, monkeypatch):
    model = resnet(device).eval()
    pixels = random_batch(model, 3)["pixels"]
    with torch.no_grad():
        expected = model.double().image_features(pixels)
        found = model.float().to(device).image_features(pixels.to(device))
        monkeypatch.setattr(type(model.image_tower), "channels_last_on", (device.type,))
        last = model.to(device).image_features(pixels.to(device))
        monkeypatch.setattr(type(model.image_tower), "channels_last_on", ("meta",))
        apart = model.to(device).image_features(pixels.to(device))
    for features in (found, last, apart):
        torch.testing.assert_close(features.cpu().double(), expected, atol=2e-3, rtol=0)


@pytest.fixture
def alone(device, tmp_path):
    """A process group of one, on a card."""
    if device.type == "cpu":
        pytest.skip("torch shares statistics on cards alone")
    place = f"file://{tmp_path}/group"
    dist.init_process_group("nccl", init_method=place, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("together", [False, True])
def test_statistics_shared_over_devices_equal_those_of_one(device, alone, monkeypatch, together):
    """Kernels and exchange of SyncBatchNorm in a group of one, where the module itself would not take them; gradients too."""

    def shared(module, x):
        numbers = module.weight, module.bias, module.running_mean, module.running_var
        return SyncBatchNorm.apply(x, *numbers, module.eps, module.momentum, alone, 1)

    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", shared)
    found = []
    for convert in (False, True):
        model = resnet(device)
        monkeypatch.setattr(type(model.image_tower), "channels_last_on", ("cuda",) if together else ("meta",))
        if convert:
            model.image_tower = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.image_tower)
        model.to(device).train()
        features = model.image_features(random_batch(model, 4)["pixels"].to(device))
        (features @ features.detach().roll(1, 0).T).sum().backward()
        numbers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        found.append(
            {"features": features.detach(), **numbers, **{n: p.grad for n, p in model.image_tower.named_parameters()}}
        )
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(found[1][name], expected, atol=5e-3 * scale + 1e-6, rtol=0, msg=name)


def test_statistics_are_shared_where_they_move_over_several_cards():
    for world, kind, frozen in itertools.product((1, 2), ("cpu", "cuda"), (False, True)):
        context, plan = SimpleNamespace(world=world, device=torch.device(kind)), SimpleNamespace(image_frozen=frozen)
        assert trainer_module.shares_statistics(context, plan) is (world == 2 and kind == "cuda" and not frozen)


def test_a_stage_with_shared_statistics_trains_the_same_weights(device, ready, monkeypatch):
    """The tower is converted before the optimizer is made; on one device that changes no number and no name. (A card sums in another
    order every time, and where a gradient is next to nothing Adam goes a whole step either way.)"""
    start = {
        "image": {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 16, "heads": 2, "image_size": 64},
        "text": {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0},
        "projection": 16,
    }
    found = []
    for shared in (False, True):
        monkeypatch.setattr(trainer_module, "shares_statistics", lambda *_, shared=shared: shared)
        trainer = ready(stage={"steps": 9}, precision="fp32", layers=0, start=start)
        kinds = {type(m) for m in trainer.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        assert kinds == {torch.nn.SyncBatchNorm if shared else torch.nn.BatchNorm2d}
        batches = trainer.batches()
        for _ in range(3):
            trainer.take(next(batches))
        with trainer.judged() as model:
            found.append({name: tensor.cpu().clone() for name, tensor in model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        near = {"atol": 0, "rtol": 0} if device.type == "cpu" else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close(found[1][name], expected, **near, msg=name)


def test_moments_lie_in_memory_as_the_weights_of_another_device(ready, monkeypatch, device):
    """A state of a device that keeps channels apart goes on where they are together, and the other way round: fused optimizers take no mixture."""
    tower = type(resnet(torch.device("cpu")).image_tower)
    start = {
        "image": {"kind": "resnet", "layers": [1, 1, 1, 1], "width": 16, "heads": 2, "image_size": 64},
        "text": {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0},
        "projection": 16,
    }
    here, elsewhere = (device.type,), ("meta",)
    for first, second in ((elsewhere, here), (here, elsewhere)):
        losses = {}
        for change in (False, True):
            monkeypatch.setattr(tower, "channels_last_on", first)
            trainer = ready(stage={"steps": 9}, precision="fp32", layers=0, start=start)
            batches = trainer.batches()
            for _ in range(2):
                trainer.take(next(batches))
            if change:
                monkeypatch.setattr(tower, "channels_last_on", second)
                trainer = Trainer(trainer.context, trainer.plan, trainer.whole, copy.deepcopy(trainer.state_dict()))
            parameters = list(trainer.optimizer.state)
            assert any(not p.is_contiguous() for p in parameters) is ((second if change else first) == here)
            assert all(
                m.stride() == p.stride() for p in parameters for m in trainer.optimizer.state[p].values() if m.ndim
            )
            batches = trainer.batches()
            losses[change] = [trainer.take(next(batches)).loss.item() for _ in range(3)]
        assert losses[True] == pytest.approx(losses[False], abs=2e-4 if device.type == "cpu" else 2e-3)


def test_a_second_family_steps_like_on_the_cpu(device, letters, stores, tmp_path, elsewhere):
    start = {"image": {"kind": "tiles"}, "text": {"kind": "speller"}, "projection": 12}
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0, "context_length": 16}
    found = {}
    for kind in ("cpu", device.type):
        elsewhere(kind)
        trainer = prepared(
            tiny_recipe(
                stores,
                model={"start": start},
                data=data,
                precision="fp32",
                output=str(tmp_path / "run"),
                feature_cache=str(tmp_path / kind),
            )
        )
        batches = trainer.batches()
        assert trainer.context.device.type == kind
        found[kind] = [trainer.take(next(batches)).loss.item() for _ in range(4)]
    assert found[device.type] == pytest.approx(found["cpu"], abs=1e-3)


@pytest.mark.parametrize("name", ["clip", "siglip of version 2", "siglip2"])
def test_towers_of_transformers_give_the_cpu_s_features_and_gradients(device, name, tmp_path):
    """Squares, and pictures in their own shape, of which the CPU leaves the padding out; float64."""
    model = load(CARDS[name].write(tmp_path / "start")).double()
    pixels = torch.stack([model.image_tower.preprocessing.decode(file) for file in photos(4)])
    inputs = (pixels, *model.tokenizer.pad(model.tokenizer.encode(["狗", "a red car", "", "dog " * 9])))
    found = {}
    for place in (torch.device("cpu"), device):
        model.to(place).zero_grad()
        images, texts = model(*(each.to(place) for each in inputs))
        (images * texts).sum().backward()
        gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
        found[place.type] = {"images": images.detach().cpu(), "texts": texts.detach().cpu(), **gradients}
    for part, expected in found["cpu"].items():
        torch.testing.assert_close(found[device.type][part], expected, atol=1e-9, rtol=1e-6, msg=part)


def test_exported_graphs_run_on_the_card(device, tmp_path):
    """ONNX Runtime's provider for CUDA, where it is there."""
    if device.type == "cpu":
        pytest.skip("tests/export has the CPU's")
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA (pip install onnxruntime-gpu)")
    pytest.importorskip("onnxscript")
    from cnclip_ft.export.run import export_checkpoint

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # torch's
    model = load(tiny.make_checkpoint(tmp_path / "best")).eval()
    out = export_checkpoint(tmp_path / "best", "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(out / "image.onnx"), providers=["CUDAExecutionProvider"])
    assert session.get_providers()[0] == "CUDAExecutionProvider"  # what does not load is passed over in silence
    pixels = random_batch(model, 3)["pixels"]
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.image_features(pixels), atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", ["tiny", "ViT-B-16"])
def test_features_of_a_published_size_are_the_cpu_s(device, size):
    if device.type == "cpu" and size != "tiny":
        pytest.skip("a CPU beside itself; the tiny size shows that the test works")
    model = build_start({"architecture": size})[0].eval()
    batch = random_batch(model, 4)
    with torch.no_grad():
        expected = model(batch["pixels"], batch["input_ids"], batch["attention_mask"])
        found = model.to(device)(*(batch[name].to(device) for name in ("pixels", "input_ids", "attention_mask")))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["clip", "siglip of version 2", "siglip2"])
def test_patches_of_every_method_are_the_cpu_s(device, name, tmp_path):
    """Squares, and pictures in their own shape, of which the CPU leaves the padding out; float64."""
    model = load(CARDS[name].write(tmp_path / "start")).double().eval()
    pixels = torch.stack([model.image_tower.preprocessing.decode(file) for file in photos(4)])
    found = {}
    for place in (torch.device("cpu"), device):
        model.to(place)
        with torch.no_grad():
            given = [model.patch_features(pixels.to(place), method) for method in model.image_tower.patch_methods]
            tokens = model.image_tokens(pixels.to(place))
        count = int(tokens.grid.prod(1).min())  # of what every picture has
        parts = [*(each.features for each in given), tokens.patches, tokens.pooled[:, None]]
        found[place.type] = [tokens.grid.cpu(), *(part[:, :count].cpu() for part in parts)]
    for ours, theirs in zip(found[device.type], found["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)
