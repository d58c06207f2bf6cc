"""Training on crops of a size of their own, for image towers that take any."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.training.memory import bytes_per_pair
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.models import tower_fixture
from tests.models.helpers import TEXT
from tests.training.helpers import losses, one_stage, planned, write_several

HERE = "tests.models.tower_fixture"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_several(tmp_path_factory.mktemp("crops"))


def recipe_of(place, folder, size, tower="convolutional", **stage):
    augment = {"crop": 0.5, "size": size}
    start = {"image": f"{HERE}:{tower}", "text": TEXT, "projection": 32}
    return one_stage(
        place, folder, {"train": "both", "batch_size": 8, "augment": augment} | stage, model={"start": start}
    )


@pytest.mark.parametrize("stage", [{}, {"micro_batch_size": 3, "batch_norm": "frozen"}, {"train": "text", "views": 2}])
def test_steps_see_crops_of_the_size_and_pictures_are_judged_in_full(place, tmp_path, monkeypatch, stage):
    seen = []
    forward = tower_fixture.Small.forward

    def watched(self, pixels):
        seen.append((self.conv.weight.requires_grad and torch.is_grad_enabled(), pixels.shape[-1]))
        return forward(self, pixels)

    monkeypatch.setattr(tower_fixture.Small, "forward", watched)
    assert train(recipe_of(place, tmp_path / "run", 16, **stage))
    assert {size for _, size in seen} == {16, 24}  # 24 where it is judged
    if stage.get("train") != "text":
        assert {size for trains, size in seen if trains} == {16}
    monkeypatch.undo()
    assert train(recipe_of(place, tmp_path / "full", None, **stage))
    assert losses(tmp_path / "run") != losses(tmp_path / "full")


def test_the_plan_tells_it_and_its_memory(place, tmp_path):
    plans = [planned(recipe_of(place, tmp_path / "run", size)) for size in (16, None)]
    texts = [describe(*each) for each in plans]
    assert "learns from crops of 16 × 16, is judged by pictures of 24 × 24" in texts[0] and "crops of" not in texts[1]
    small, full = (bytes_per_pair(context, stages[0], model) for context, model, stages in plans)
    assert small < full


@pytest.mark.parametrize(
    "tower,size,message",
    [
        ("plain", 16, "takes pictures of 24 alone: stages.learn.augment.size=null, or any_size = True"),
        ("convolutional", 11, "size is 11; it may be 12 to 24"),
        ("convolutional", 25, "size is 25; it may be 12 to 24"),
    ],
)
def test_sizes_that_are_refused(place, tmp_path, tower, size, message):
    with pytest.raises(RequestError, match=message):
        planned(recipe_of(place, tmp_path / "run", size, tower))


@pytest.mark.parametrize("augment", [{"size": 16}, {"size": 16, "crop": 0.5, "auto_augment": "original"}])
def test_a_size_without_crops_of_ours(place, tmp_path, augment):
    with pytest.raises(ValueError, match="size=null"):
        recipe_of(place, tmp_path / "run", None, augment=augment)
