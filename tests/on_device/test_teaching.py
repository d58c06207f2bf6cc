"""A teaching stage on every device there may be: the teacher's features of the CPU, a loss that falls."""

from __future__ import annotations

import torch

from cnclip_ft.features.encode import encode_texts, evaluating
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.training.run import train
from data_tools.build import build_store
from data_tools.sources.parallel import ParallelSource
from tests.training.helpers import losses, prepared, tiny_model
from tests.training.test_teaching import recipe_of


def test_a_stage_learns_from_a_teacher(device, stores, tmp_path):
    save_checkpoint(tiny_model(dropout=0.0, seed=7).eval(), stores / "teacher", info={})
    file = tmp_path / "rows.tsv"
    file.write_text(
        "en\tzh\n" + "".join(f"picture {n} of a dog\t第{n}张狗的照片\n" for n in range(40)), encoding="utf-8"
    )
    build_store(ParallelSource([file]), stores / "parallel", progress=False)
    recipe = recipe_of(stores, tmp_path / "run", stage={"steps": 12, "learning_rate": 3e-3}, precision="fp32")
    trainer, model = prepared(recipe, 0), load(stores / "teacher")
    with evaluating(model):
        expected = encode_texts(model, [f"picture {n} of a dog" for n in (39, 0)])
    torch.testing.assert_close(trainer.prepared.teacher.rows(torch.tensor([39, 0])), expected, atol=2e-4, rtol=1e-3)
    assert trainer.model.device.type == device.type
    assert train(recipe)
    found = losses(tmp_path / "run")
    assert found["learn", 12] < 0.7 * found["learn", 1]
