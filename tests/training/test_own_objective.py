"""A loss over pairs that is one class and one name: read, listed, planned and trained as those of the package."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from cnclip_ft.recipe_keys import keys
from cnclip_ft.recipe_stage import OBJECTIVES
from cnclip_ft.training.loss import Objective
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from tests.training.helpers import one_stage, planned, prepared, records


@dataclass(frozen=True)
class Hinge(Objective):
    """How far the nearest other text comes within a margin of the own one (VSE++, arXiv 1707.05612); of one process."""

    kind = "hinge"

    def tiled(self, images, texts, scale, bias, batch):
        z = images @ texts.T
        own, others = z.diagonal(), z - torch.diag(torch.full((len(z),), torch.inf))
        nearest = others.amax(1)
        return F.relu(0.2 + nearest - own).mean(), (own >= nearest).float().mean()


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", f"{__name__}:Hinge")


def recipe(stores, folder, **objective):
    stage = {"objective": {"kind": "hinge"} | objective, "micro_batch_size": 4}
    return one_stage(stores, folder, stage, model={"start": {"architecture": "tiny"}})


def test_it_trains_and_is_told(stores, tmp_path, known):
    own = recipe(stores, tmp_path / "run", dimensions=[8], positives="ignore")
    assert "hinge objective" in describe(*planned(own))
    assert train(own)
    (told,) = records(tmp_path / "run", "stage")
    steps = [record["loss"] for record in records(tmp_path / "run")]
    assert told["objective"] == "hinge" and len(steps) == 6 and all(0 < loss < 2.2 for loss in steps)


def test_its_value_is_what_is_trained(stores, tmp_path, known):
    """The same with micro-batches as over the features of the whole batch."""
    trainer = prepared(recipe(stores, tmp_path / "run"), number=0)
    trainer.model.eval()
    batch = next(trainer.batches())
    with torch.no_grad():
        images, texts = trainer.model(**{name: batch[name] for name in ("pixels", "input_ids", "attention_mask")})
    cosines = images @ texts.T
    own = cosines.diagonal()
    nearest = (cosines - 9 * torch.eye(len(own))).amax(1)
    torch.testing.assert_close(trainer.take(batch).loss, F.relu(0.2 + nearest - own).mean())


def test_it_is_checked_and_listed_as_others_are(stores, tmp_path, known, monkeypatch):
    (key,) = (key for key in keys() if key.path == "stages.STAGE.objective.kind")
    assert key.type == "contrastive, sigmoid, hinge or null"
    monkeypatch.delitem(OBJECTIVES, "hinge")
    with pytest.raises(ValueError, match="Input should be 'contrastive' or 'sigmoid'"):
        recipe(stores, tmp_path)
