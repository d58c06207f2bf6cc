"""What the plan says before a run, and each of its warnings."""

from __future__ import annotations

import re

import pytest
import torch

from data_tools.errors import RequestError
from tests.training.helpers import planned, tiny_recipe


def test_the_plan_says_what_will_happen_and_warns(stores):
    from cnclip_ft.training.advice import refuse_warnings
    from cnclip_ft.training.plan import describe

    recipe = tiny_recipe(stores, data={"train": str(stores / "train"), "valid": str(stores / "train"), "workers": 0})
    context, model, plans = planned(recipe)
    text = describe(context, model, plans)
    for part in (
        "stage align",
        "frozen",
        "rate 0.001",
        "6 steps",
        "computed once",
        "fp32",
        "WARNING",
        "leaves few negatives",
        "is the training split itself",
        "new      text_tower",
        "warm-up 1 step, then cosine",
    ):
        assert part in text, part
    for workers, said in ((1, "by 1 worker process\n"), (2, "by 2 worker processes\n")):
        data = {"train": str(stores / "train"), "valid": str(stores / "train"), "workers": workers}
        assert said in describe(*planned(tiny_recipe(stores, data=data)))
    with pytest.raises(RequestError, match="--strict"):
        refuse_warnings(context, model, plans)
    assert not (stores / "run").exists()


def test_every_warning_of_the_plan_is_said(stores, tmp_path):
    """Each with its suggestion; none of them where nothing is wrong."""
    from cnclip_ft.models.checkpoints import save_checkpoint
    from cnclip_ft.training.advice import warnings
    from tests.training.helpers import tiny_model

    save_checkpoint(tiny_model(), tmp_path / "start", info={})

    def said(valid="valid", **contrast):
        data = {"train": str(stores / "train"), "valid": str(stores / valid), "workers": 0}
        stage = {"steps": 60, "batch_size": 16, "learning_rate": 1e-7, "warmup_steps": 1, "train": "both"} | contrast
        recipe = tiny_recipe(tmp_path, data=data, model={"start": str(tmp_path / "start")}, stages={"contrast": stage})
        recipe = recipe.model_copy(update={"stages": {"contrast": recipe.stages["contrast"]}})
        context, model, plans = planned(recipe)
        return warnings(context, model, plans)

    assert said() == []
    for changes, words in (
        (
            {"learning_rate": 1e-3},
            r"rate 0\.001 is high for a global batch of 16 .* suggest about stages.contrast.learning_rate=2\.0e-06",
        ),
        ({"batch_size": 8}, r"batch 8 leaves few negatives; give stages.contrast.batch_size=16 or more"),
        (
            {"batch_size": 32},
            r"12 of the 32 pairs of a batch, or more, .* already \(there are 20\).*Give stages.contrast.batch_size=16",
        ),
        ({"steps": 20}, r"only 20 steps; give more, stages.contrast.steps=100"),
        ({"valid": "train"}, r"valid is the training split itself: recall will look far better"),
    ):
        (warning,) = said(**changes)
        assert re.search(words, warning), warning

    from data_tools.store import StoreWriter, open_store

    source = open_store(stores / "train")
    with StoreWriter(tmp_path / "leaking") as writer:  # one picture of the training split under its id
        writer.add_image(3, source.image(3))
        writer.add_pair(3, 0, "图片", "zh")
        writer.finish()
    data = {"train": str(stores / "train"), "valid": str(tmp_path / "leaking"), "workers": 0}
    context, model, plans = planned(tiny_recipe(tmp_path, data=data))
    assert any(
        "shares images with the training split (e.g. id 3)" in warning for warning in warnings(context, model, plans)
    )


@pytest.mark.parametrize("train", ["text", "both"])
def test_planning_changes_nothing_of_the_model(stores, train):
    """Neither weights nor statistics of batch norm, which a tower in training mode takes from whatever it is shown."""
    from cnclip_ft.training.plan import describe
    from tests.models.helpers import TEXT

    start = {"image": "tests.models.tower_fixture:Pretrained", "text": TEXT, "projection": 8}
    stage = {"train": train, "steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    context, model, plans = planned(tiny_recipe(stores, model={"start": start}, stages={"align": stage}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    describe(context, model, plans)
    assert model.image_tower.module.norm.training
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == []
