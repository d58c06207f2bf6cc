"""Runs on every device there may be: cache, workers, stopping and going on elsewhere, judging, too little memory."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.training.run import train
from cnclip_ft.training.validation import Judge
from data_tools.errors import UserError
from tests.training.helpers import losses, records, stopped_after, tiny_recipe


def test_the_feature_cache_holds_what_the_trunk_gives(device, ready):
    trainer = ready(number=0, precision="fp32")
    assert trainer.plan.cached
    keys = torch.tensor([3, 0, 19])
    store, preprocessing = trainer.context.train_store, trainer.model.image_tower.preprocessing
    pixels = torch.stack([preprocessing.decode(store.image(store.image_ids[key])) for key in keys])
    with torch.inference_mode():
        expected = trainer.model.image_trunk(pixels.to(device)).float().cpu()
    torch.testing.assert_close(trainer.prepared.cache.rows(keys, 0).float().cpu(), expected, atol=2e-4, rtol=1e-3)


def test_a_run_with_workers_pins_its_batches_and_learns(device, stores, tmp_path):
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 2}
    recipe = tiny_recipe(
        stores,
        output=str(tmp_path / "run"),
        feature_cache=str(tmp_path / "cache"),
        data=data,
        align={"feature_cache": False, "steps": 3, "validate_every": 3},
        contrast={"steps": 3, "validate_every": 3},
    )
    assert train(recipe)
    found = losses(tmp_path / "run")
    assert len(found) == 6 and all(math.isfinite(loss) for loss in found.values())
    memory = [record.get("memory_gib") for record in records(tmp_path / "run")]
    assert all((value is not None) == (device.type == "cuda") for value in memory)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_run_continues_to_the_very_bits(device, elsewhere, deterministic, stores, tmp_path, precision):
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("a CPU does not train in fp16")

    def recipe(name):
        return tiny_recipe(
            stores, output=str(tmp_path / name), feature_cache=str(tmp_path / "cache"), precision=precision
        )

    for name, settings in (("whole", {}), ("parts", stopped_after(("contrast", 2)))):
        elsewhere(device.type)
        assert train(recipe(name), **settings) == (name == "whole")
    elsewhere(device.type)
    assert train(recipe("parts"), proceed=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = (load(tmp_path / name / "contrast" / "last").state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("towards", ["the CPU", "the device"])
def test_a_run_goes_on_on_another_kind_of_device(device, elsewhere, sized, stores, tmp_path, towards):
    """States hold nothing of the device: the losses after the change are those of a run that stayed."""
    if device.type == "cpu" and towards == "the CPU":
        pytest.skip("there is one kind of device here: once is enough")
    places = [device.type, "cpu"] if towards == "the CPU" else ["cpu", device.type]

    def recipe(name):
        return tiny_recipe(
            stores,
            output=str(tmp_path / name),
            feature_cache=str(tmp_path / "cache"),
            precision="fp32",
            model={"start": sized(layers=0)["start"]},
            align={"steps": 2, "validate_every": 2},
            contrast={"ema": 0.9, "steps": 4},
        )

    elsewhere(places[0])
    assert train(recipe("stayed"))
    elsewhere(places[0])
    assert not train(recipe("moved"), **stopped_after(("contrast", 2)))
    elsewhere(places[1])
    assert train(recipe("moved"), proceed=True)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "stayed"), abs=2e-3)


def test_a_checkpoint_of_this_device_is_the_cpu_s(device, ready, tmp_path):
    """Written on the device, read and used on the CPU and on the device; validation gives both the same recall."""
    trainer = ready(precision="fp32")
    save_checkpoint(trainer.whole, tmp_path / "saved", info={})
    there, here = load(tmp_path / "saved").to(device), load(tmp_path / "saved")
    assert here.device.type == "cpu"
    texts = ["一只猫", "山和水", "a red dog"]
    torch.testing.assert_close(there.encode_texts(texts).cpu(), here.encode_texts(texts), atol=1e-4, rtol=0)
    context = trainer.context
    judged = Judge(context.evaluators, context.device, 0, context.autocast)(there).scores["valid"]
    again = Judge(context.evaluators, torch.device("cpu"), 0, nullcontext)(here).scores["valid"]
    assert 0 <= judged.mean_recall <= 100
    assert judged.mean_recall == pytest.approx(again.mean_recall, abs=5.1)  # one of 20 queries may tie


# ---- what only a card has -----------------------------------------------------------------------------------------

LARGE = {
    "image": {"kind": "vit", "hidden": 256, "layers": 6, "heads": 4, "patch": 8, "image_size": 96},
    "text": {"hidden": 256, "layers": 4, "heads": 4, "dropout": 0.0},
    "projection": 64,
}


@pytest.fixture
def little_memory(device, many):
    """A store of 256 pairs, and a card of which 1.2 GiB may be used."""
    if device.type != "cuda":
        pytest.skip("a CPU has no memory of its own to run out of")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    yield many
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def run_of(folder, tmp_path, micro):
    stage = {"batch_size": 256, "steps": 2, "validate_every": 2, "micro_batch_size": micro}
    return tiny_recipe(
        folder,
        output=str(tmp_path / f"run-{micro}"),
        feature_cache=str(tmp_path / "cache"),
        precision="fp32",
        model={"start": LARGE},
        align={"steps": 1, "warmup_steps": 0, "validate_every": 1},
        contrast=stage,
    )


def test_out_of_memory_is_told_with_a_size_that_fits(little_memory, tmp_path):
    told = r"out of memory on cuda.*micro_batch_size=(\d+) \(fits, tried just now; same gradient"
    with pytest.raises(UserError, match=told) as refused:
        train(run_of(little_memory, tmp_path, None))
    assert int(re.search(told, str(refused.value))[1]) >= 32  # not what fits beside the step that did not


def test_an_automatic_micro_batch_fits_and_trains(little_memory, tmp_path):
    assert train(run_of(little_memory, tmp_path, "auto"))
    said = (tmp_path / "run-auto" / "journal.jsonl").read_text(encoding="utf-8")
    assert len(losses(tmp_path / "run-auto")) == 3, said
