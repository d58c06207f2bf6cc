"""Hard negatives on every device there may be: a step's gradient is that of the CPU, and a run trains in micro-batches."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.training.run import train
from data_tools.store import StoreWriter, open_store
from tests.training.helpers import losses, prepared, write_stores
from tests.training.test_hard_negatives import recipe_of


@pytest.fixture
def told(tmp_path):
    """Twenty pictures, each under a caption in which two things can be swapped."""
    write_stores(tmp_path / "pictures")
    for name in ("train", "valid"):
        shown = open_store(tmp_path / "pictures" / name)
        with StoreWriter(tmp_path / name) as writer:
            for number, image_id in enumerate(shown.image_ids):
                writer.add_image(image_id, shown.image(image_id))
                writer.add_pair(
                    image_id,
                    number,
                    f"{'一两三四五六'[number % 6]}只{'黑白红绿蓝'[number % 5]}色的{'狗猫鸟'[number % 3]}{number}",
                )
            writer.finish()
    return tmp_path


def test_a_step_and_a_run(device, told):
    stage = {"steps": 12, "learning_rate": 3e-3, "micro_batch_size": 3}
    recipe = recipe_of(told, told / "run", negatives={"count": 2}, stage=stage, precision="fp32")
    trainer = prepared(recipe, 0)
    assert trainer.model.device.type == device.type
    batch = next(trainer.batches())
    batch |= trainer.plan.negatives.batch(batch["pairs"].numpy()[:, None], 0)
    trainer.gradient(dict(batch))
    found = trainer.model.text_tower.projection.weight.grad.cpu()
    here = trainer.model.cpu()
    here.zero_grad()
    trainer.gradient(dict(batch))
    torch.testing.assert_close(found, here.text_tower.projection.weight.grad, atol=2e-4, rtol=2e-3)
    assert train(recipe)
    known = losses(told / "run")
    assert known["learn", 12] < known["learn", 1]
