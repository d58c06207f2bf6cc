"""What is fast on a card, in a stage of a real run: JPEGs decoded there, the frozen trunk away, 8-bit products."""

from __future__ import annotations

import io
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training import context as context_module
from cnclip_ft.training import fp8
from cnclip_ft.training.run import train
from cnclip_ft.training.trainer import Trainer
from data_tools.store import StoreWriter
from tests.data.jpeg_decoders import PillowDecoder, hurt
from tests.training.helpers import prepared, records, tiny_recipe
from tests.training.test_fp8 import rounded


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty JPEGs of many sizes, two of them damaged behind their header, one to be turned, and as many to judge by."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("train", "valid"):
        with StoreWriter(folder / name) as writer:
            for number in range(40):
                rough = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(rough).resize((300 + number, 260), Image.Resampling.BICUBIC)
                exif, file = Image.Exif(), io.BytesIO()
                exif[0x0112] = 6 if number == 9 else 1
                image.save(file, "JPEG", exif=exif)
                data = file.getvalue()
                if name == "train" and number in (3, 17):
                    data = hurt(data)
                writer.add_image(number, data)
                writer.add_pair(number, number, f"第{number}张图片", "zh")
            writer.finish()
    return folder


@pytest.fixture
def decoder(device, monkeypatch):
    """The card's own, or a stand-in where there is none."""
    if device.type == "cpu":
        monkeypatch.setattr(
            context_module,
            "choose_decoder",
            lambda wanted, *_: (PillowDecoder(), "a stand-in") if wanted == "device" else (None, "asked for"),
        )
    elif not (find_spec("nvidia") and find_spec("nvidia.nvimgcodec")) and not find_spec("torchvision"):
        pytest.skip("neither nvImageCodec nor torchvision is installed")


def test_a_stage_trains_as_well_on_pictures_decoded_by_the_device(device, decoder, sized, photos, tmp_path):
    """Damaged pictures are named and replaced; losses are those of the workers' road but for what JPEG decoders differ in."""

    def steps(where: str) -> tuple[list[float], list[str]]:
        data = {"train": str(photos / "train"), "valid": str(photos / "valid"), "reduced_jpegs": False}
        recipe = tiny_recipe(
            photos,
            model={"start": sized(layers=0)["start"]},
            data=data | {"workers": 1, "decode": where},
            output=str(tmp_path / where),
            precision="fp32",
            contrast={"steps": 5, "learning_rate": 1e-4},
        )
        trainer = prepared(recipe)
        assert (trainer.context.decoder is not None) is (where == "device")
        taken, faults, waits = [], [], []
        for batch in trainer.batches():
            faults += batch["faults"]
            taken.append(trainer.take(batch).loss.item())
            waits.append(trainer.waited_for_decoding())
        assert all(wait >= 0 for wait in waits) and ((where, device.type) == ("device", "cuda") or not any(waits))
        return taken, faults

    (found, named), (expected, right) = steps("device"), steps("workers")
    assert len(found) == 5 and found == pytest.approx(expected, abs=2e-3)
    # Forty pictures in five batches, each once; the damaged ones are among them.
    assert sorted(named) == sorted(right) and len(named) == 2


def test_the_journal_counts_it_as_waiting_for_data(stores, tmp_path, monkeypatch):
    """Like what workers are waited for, at every line once."""
    told = iter([0.0, *[3600.0] * 100])
    monkeypatch.setattr(
        Trainer, "waited_for_decoding", lambda trainer: next(told) if trainer.plan.name == "contrast" else 0.0
    )
    short = {"steps": 2, "validate_every": 2}
    assert train(tiny_recipe(stores, output=str(tmp_path / "run"), align=short, contrast=short))
    found = {(line["stage"], line["step"]): line["data_wait"] for line in records(tmp_path / "run")}
    assert all(found["align", step] < 1 for step in (1, 2)) and found["contrast", 2] > 100


def test_the_frozen_trunk_is_away_while_its_features_are_trained_on(device, sized, stores, tmp_path, monkeypatch):
    """At every step of the first stage; at none of the second. Nothing is left of it on the card."""
    seen: dict[str, set[str]] = {"align": set(), "contrast": set()}

    def look(trainer):
        seen[trainer.plan.name] |= {p.device.type for p in trainer.whole.trunk_parameters()}
        assert {p.device.type for p in trainer.optimizer.state} <= {device.type}

    moved, whole = [], DualEncoder.place_trunk
    monkeypatch.setattr(
        DualEncoder, "place_trunk", lambda model, place: moved.append(torch.device(place).type) or whole(model, place)
    )
    short = {"steps": 4, "validate_every": 2}
    recipe = tiny_recipe(
        stores,
        model={"start": sized(layers=0)["start"]},
        output=str(tmp_path / "run"),
        feature_cache=str(tmp_path / "cache"),
        align=short,
        contrast=short,
    )
    assert train(recipe, before_step=look)
    assert seen == {"align": {"cpu"}, "contrast": {device.type}}
    assert moved == ["cpu"]  # features of the validation pictures were there from before the first step


def test_products_in_eight_bits_train(device, ready, monkeypatch):
    """Near the step in bf16. On the CPU a stand-in rounds."""
    if device.type == "cpu":
        monkeypatch.setattr(context_module, "check_fp8", lambda *_: None)
        monkeypatch.setattr(fp8, "eight_bit", rounded)
    else:
        pytest.importorskip("torchao", reason="torchao is not installed")
        if torch.cuda.get_device_capability(device) < (8, 9):
            pytest.skip("this card has no 8-bit products")
    found = {}
    for eight in (False, True):
        trainer = ready(precision="bf16", fp8=eight, layers=2)
        batches = trainer.batches()
        found[eight] = [trainer.take(next(batches)).loss.item() for _ in range(3)]
    assert found[True] != found[False] and found[True] == pytest.approx(found[False], abs=0.1)
    with trainer.judged() as model:
        assert type(next(m for m in model.modules() if isinstance(m, torch.nn.Linear))) is torch.nn.Linear
