"""What the tests on every device share: stores, sizes, runs that take the device, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from cnclip_ft.training.trainer import Trainer
from tests.training.helpers import prepared, tiny_recipe, write_store, write_stores


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """256 pictures with a caption each."""
    folder = tmp_path_factory.mktemp("many")
    for name in ("train", "valid"):
        write_store(folder / name, images=256, captions=1, seed=0)
    return folder


@pytest.fixture
def sized(device, stores, many) -> Callable[..., dict[str, Any]]:
    """What a step is made of: a tiny model on the CPU, `layers` of ViT-B-16 and 64 pairs on a card (0: tiny there too)."""

    def of(layers: int = 2) -> dict[str, Any]:
        if device.type == "cpu" or not layers:
            image = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
            text = {"hidden": 32, "layers": 2, "heads": 2, "dropout": 0.0}
            return {"folder": stores, "start": {"image": image, "text": text, "projection": 16}, "batch_size": 8}
        image = {"kind": "vit", "hidden": 768, "layers": layers, "heads": 12, "patch": 16, "image_size": 224}
        text = {"hidden": 768, "layers": layers, "heads": 12, "dropout": 0.0}
        return {"folder": many, "start": {"image": image, "text": text, "projection": 512}, "batch_size": 64}

    return of


@pytest.fixture
def ready(sized, tmp_path) -> Callable[..., Trainer]:
    """A stage of that size ready for its first step; nothing was judged. `changes` are the recipe's, `stage` the stage's."""
    count = iter(range(100))

    def make(
        number: int = 1, stage: dict[str, Any] | None = None, layers: int = 2, start: Any = None, **changes: Any
    ) -> Trainer:
        size = sized(layers)
        of_stage = {"batch_size": size["batch_size"], "learning_rate": 1e-4, **(stage or {})}
        recipe = tiny_recipe(
            size["folder"],
            output=str(tmp_path / f"run{next(count)}"),
            feature_cache=str(tmp_path / "cache"),
            model={"start": start or size["start"]},
            align=of_stage,
            contrast=of_stage,
            **changes,
        )
        return prepared(recipe, number)

    return make


@pytest.fixture
def elsewhere(device, monkeypatch) -> Callable[[str], None]:
    """The runs made from here on take the device of this kind: the same one twice where there is only a CPU."""

    def go(kind: str) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind == "cuda" == device.type)
        AcceleratorState._reset_state(reset_partial_state=True)

    return go


@pytest.fixture
def deterministic():
    """The same bits every time, on a card too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
