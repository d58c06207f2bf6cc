"""What goes to a card is pinned by the loader and copied without waiting, to train and to encode; elsewhere nothing is pinned."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cnclip_ft.features.encode import Meter, encode_texts
from cnclip_ft.features.shared_encoder import SharedEncoder
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.runtime import to_device
from cnclip_ft.search.index.pictures import encode_pictures
from cnclip_ft.training import large_batch, loss
from data_tools.store import open_store
from tests.training.helpers import tiny_model

COPIED = {"pixels", "input_ids", "attention_mask", "image_keys", "text_keys"}


class Memory:
    """Stands for the memory of a machine with a card: which tensors are pinned, and how each was copied."""

    def __init__(self, monkeypatch) -> None:
        self.pinned: list[torch.Tensor] = []
        self.copies: list[tuple[str, bool, bool]] = []  # place, pinned, non_blocking
        whole = torch.Tensor.to

        def to(tensor, *args, **kwargs):
            if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
                self.copies.append((args[0].type, tensor.is_pinned(), kwargs.get("non_blocking", False)))
                return tensor
            return whole(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: self.is_pinned(tensor))
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        # A part of a pinned tensor is pinned.
        memory = tensor.untyped_storage().data_ptr()
        return any(memory == other.untyped_storage().data_ptr() for other in self.pinned)


def batch_of(trainer, kind: str, workers: int):
    trainer.context = replace(trainer.context, device=torch.device(kind))
    batches = trainer.batches(workers)
    batch = next(batches)
    batches.close()
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["cuda", "cpu", "mps"])
def test_the_loader_pins_exactly_for_a_card(device, ready, monkeypatch, kind, workers):
    """A fake card: every tensor a step copies is pinned once, and copied without waiting, not pinned anew."""
    if device.type == "cuda":
        pytest.skip("a card is there, see below")
    trainer = ready(layers=0)
    memory = Memory(monkeypatch)
    batch = batch_of(trainer, kind, workers)
    assert COPIED <= batch.keys()
    assert all(tensor.is_pinned() is (kind == "cuda") for tensor in batch.values())
    if kind == "cuda":
        before = len(memory.pinned)
        for name in COPIED:
            to_device(batch[name], torch.device("cuda"))
        assert memory.copies == [("cuda", True, True)] * len(COPIED) and len(memory.pinned) == before
    else:
        assert not memory.pinned


def test_what_was_not_pinned_is_before_it_is_copied(monkeypatch):
    memory = Memory(monkeypatch)
    to_device(torch.arange(3), torch.device("cuda"))
    assert memory.copies == [("cuda", True, True)]


def test_a_step_copies_all_of_a_batch_so(ready, monkeypatch):
    trainer, copied = ready(layers=0), []
    batch = next(trainer.batches())
    for module in (large_batch, loss):
        monkeypatch.setattr(module, "to_device", lambda tensor, place: copied.append(id(tensor)) or tensor.to(place))
    trainer.take(batch)
    assert {id(batch[name]) for name in COPIED} <= set(copied)


@pytest.fixture
def card(device, monkeypatch) -> Callable[[], Memory]:
    """From here on every model says that it lies on a card, and computes on the CPU."""
    if device.type == "cuda":
        pytest.skip("a card is there, where this would be one that is made up")

    def claim() -> Memory:
        monkeypatch.setattr(DualEncoder, "device", property(lambda model: torch.device("cuda")))
        return Memory(monkeypatch)

    return claim


@pytest.mark.parametrize("workers", [0, 1])
def test_features_of_a_frozen_trunk_are_computed_of_what_the_loader_pinned(card, ready, workers):
    trainer = ready(number=0, layers=0, stage={"views": 2, "augment": {"colour": 0.2}})
    cache, context = trainer.prepared.cache, trainer.context
    expected = np.array(cache.build(context.accelerator, context.autocast) and cache._features)
    shutil.rmtree(cache.folder)
    memory = card()
    assert cache.build(context.accelerator, context.autocast, images_at_once=8, workers=workers)
    assert memory.copies == [("cuda", True, True)] * 6 and len(memory.pinned) == 2  # twenty pictures, twice
    np.testing.assert_allclose(cache._features, expected, atol=1e-5)


def test_all_that_is_encoded_is_copied_so(stores, card):
    model, store = tiny_model(dropout=0.0).eval(), open_store(stores / "valid")
    memory = card()
    with torch.inference_mode():
        encode_texts(model, ["一只猫", "a red dog"])
        SharedEncoder(model)._projected(torch.randn(3, 32))
        list(encode_pictures(model, store.image_ids, store.image, batch_size=5, workers=0, meter=Meter(10, "", False)))
    assert memory.copies == [("cuda", True, True)] * 5  # ids and mask, rows, two batches of pictures


@pytest.mark.parametrize("workers", [0, 1])
def test_a_real_card_gets_pinned_batches(device, ready, workers):
    trainer = ready(layers=0)
    batch = batch_of(trainer, device.type, workers)
    assert COPIED <= batch.keys() and all(tensor.is_pinned() is (device.type == "cuda") for tensor in batch.values())
