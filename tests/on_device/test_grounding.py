"""A stage that learns boxes on every device there may be: a loss that falls, the CPU's numbers in the first step, heads that are kept."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy")

from cnclip_ft.models.checkpoints import load  # noqa: E402
from cnclip_ft.training.run import train
from tests.training.boxes import boxes_recipe, write_boxes
from tests.training.helpers import losses, prepared


def test_a_stage_learns_boxes(device, stores, tmp_path, elsewhere):
    write_boxes(stores / "boxes", pictures=24, seed=0)
    write_boxes(stores / "held", pictures=12, seed=1)
    recipe = boxes_recipe(
        stores, tmp_path / "run", stage={"steps": 30, "validate_every": 30, "learning_rate": 3e-4}, precision="fp32"
    )
    first = {}
    for kind in ("cpu", "cuda"):
        elsewhere(kind)
        trainer = prepared(recipe, 0)
        assert trainer.model.device.type == (device.type if kind == "cuda" else "cpu")
        first[kind] = float(trainer.take(next(trainer.batches())).loss)
    assert first["cuda"] == pytest.approx(first["cpu"], rel=1e-3)
    assert train(recipe)
    found = losses(tmp_path / "run")
    assert found["boxes", 30] < 0.5 * found["boxes", 1]
    assert load(tmp_path / "run" / "boxes" / "best").heads is not None
