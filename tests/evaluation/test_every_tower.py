"""Every kind of tower through the evaluation commands: RN50's, one by import path, a checkpoint after low-rank updates."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.features.encode import encode_split
from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.retrieval.recall import recall
from data_tools.store import open_store
from tests.models.helpers import RESNET, VIT, small

IMPORTED = VIT | {"image": "tests.models.tower_fixture:plain"}


def after_low_rank_updates():
    """A model as a stage with LoRA leaves it: updates trained (here: drawn), then merged."""
    pytest.importorskip("peft")
    from cnclip_ft.recipe_stage import TrainRule
    from cnclip_ft.training.lora import add_lora, merged
    from cnclip_ft.training.loss import ContrastiveObjective
    from cnclip_ft.training.optimizer import training_table

    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rules = [
        TrainRule(tower="image", lora={"rank": 2}),
        TrainRule(tower="text", lora={"rank": 2}),
        TrainRule(tower="temperature"),
    ]
    for entry in add_lora(model, training_table(model, ContrastiveObjective(), rules)):
        if "lora_B" in entry.name:
            torch.nn.init.normal_(entry.parameter, std=0.3)
    with merged(model):
        changed = sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert changed > 10
        yield model


@pytest.fixture(scope="module", params=["resnet", "import path", "lora"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "best"
    if request.param == "lora":
        for model in after_low_rank_updates():
            save_checkpoint(model, folder, info={})
    else:
        save_checkpoint(small(RESNET if request.param == "resnet" else IMPORTED), folder, info={})
    return folder


def test_recall_is_that_of_the_model_s_own_features(folder, store):
    model, split = load(folder, trust_import=True), open_store(store)
    features = encode_split(model, split)
    assert torch.allclose(
        features.image_features, model.encode_images([split.image(i) for i in features.image_ids]), atol=1e-6
    )
    scores = recall(features)
    similarity = features.text_features.double() @ features.image_features.double().T
    positive = torch.zeros_like(similarity, dtype=torch.bool)
    positive[features.positives[:, 1], features.positives[:, 0]] = True
    asks = positive.any(1)
    best = similarity.masked_fill(~positive, -2).amax(1)
    ranks = 1 + ((similarity >= best[:, None] - 1e-11) & ~positive).sum(1)
    for k in (1, 5, 10):
        assert scores.text_to_image.recall[k] == pytest.approx(100 * (ranks[asks] <= k).float().mean().item())


def test_the_commands_take_it(folder, store, tmp_path):
    scores = tmp_path / "scores.json"
    for arguments in (
        ["evaluate", folder, store, "--json", scores],
        ["encode", folder, store, "--output", tmp_path / "features"],
        ["compare", folder, folder, "--split", store],
        ["search", "index", folder, store, "--output", tmp_path / "index"],
        ["search", "query", tmp_path / "index", "狗"],
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), "--trust-import"])
        assert result.exit_code == 0, (arguments[0], result.exception, result.output)
    assert "mean_recall" in scores.read_text(encoding="utf-8")
    json.loads(scores.read_text(encoding="utf-8"))
