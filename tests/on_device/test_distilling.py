"""A stage with a teacher beside its pairs on every device there may be: kept features, and pictures shown as they are augmented."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.training.run import train
from data_tools.store import open_store
from tests.training.helpers import losses, prepared, tiny_model
from tests.training.test_distilling import recipe_of


@pytest.mark.parametrize("augment", [{}, {"colour": 0.2}])
def test_a_stage_learns_from_a_teacher_beside_its_pairs(device, stores, tmp_path, augment):
    save_checkpoint(tiny_model(dropout=0.0, seed=7).eval(), stores / "teacher", info={})
    stage = {"steps": 12, "learning_rate": 3e-3, "augment": augment}
    recipe = recipe_of(stores, tmp_path / "run", distill={"pairs": 0}, stage=stage, precision="fp32")
    trainer, model = prepared(recipe, 0), load(stores / "teacher")
    taught, pair = trainer.prepared.taught, next(open_store(stores / "train").pairs())
    found = taught.texts_of(torch.tensor([0]))
    assert found.device.type == trainer.model.device.type == device.type
    torch.testing.assert_close(found.cpu(), model.encode_texts(pair.text), atol=2e-4, rtol=1e-3)
    assert train(recipe)
    found = losses(tmp_path / "run")
    assert found["learn", 12] < 0.8 * found["learn", 1]
