"""The table of what trains: every parameter once, its rate and decay."""

from __future__ import annotations

import pytest
import torch

from cnclip_ft.recipe import Stage
from cnclip_ft.recipe_stage import TrainRule
from cnclip_ft.training.loss import ContrastiveObjective, SigmoidObjective
from cnclip_ft.training.optimizer import RateCurve, apply_entries, build_optimizer, rules_for, training_table
from data_tools.errors import RequestError
from tests.training.helpers import tiny_model

MODEL = tiny_model()


def stage(**changes) -> Stage:
    return Stage.model_validate({"train": "both", "steps": 20, "batch_size": 4, "learning_rate": 1e-3, **changes})


def table(rules, objective=None, new=()):
    return training_table(MODEL, objective or ContrastiveObjective(), rules_for(stage(train=rules), list(new)))


def rates(entries, tower=None):
    return {entry.name: entry.rate for entry in entries if tower in (None, entry.tower)}


def test_the_three_names():
    assert all(rates(table("both")).values())
    text = table("text")
    assert (
        not any(rates(text, "image").values()) and all(rates(text, "text").values()) and rates(text)["logit_scale"] == 1
    )
    image = table("image")
    assert not any(rates(image, "text").values()) and all(rates(image, "image").values())


def test_a_new_projection_on_a_frozen_trunk_trains():
    entries = rates(table("text", new=["image_tower.visual_projection"]), "image")
    assert [name for name, rate in entries.items() if rate] == ["image_tower.visual_projection.weight"]


def test_every_parameter_is_covered_exactly_once():
    names = [entry.name for entry in table("both", SigmoidObjective())]
    assert sorted(names) == sorted([n for n, _ in MODEL.named_parameters()] + ["logit_bias"])


def test_last_layers_and_layer_decay():
    rules = [
        {"tower": "text", "part": "last 1", "rate": 0.5}, {"tower": "text", "part": "projection", "rate": 2},
        {"tower": "text", "part": "rest", "rate": 0}, {"tower": "temperature"}, {"tower": "image", "layer_decay": 0.5},
    ]  # fmt: skip
    found = rates(table(rules))
    assert found["text_tower.text_projection.weight"] == 2
    assert found["text_tower.text_model.encoder.layer.1.output.dense.weight"] == 0.5
    assert found["text_tower.text_model.encoder.layer.0.output.dense.weight"] == 0
    assert found["text_tower.text_model.embeddings.word_embeddings.weight"] == 0
    assert found["image_tower.visual_projection.weight"] == 1
    assert found["image_tower.vision_model.encoder.layers.1.mlp.fc1.weight"] == 0.5
    assert found["image_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] == 0.25
    assert found["image_tower.vision_model.embeddings.class_embedding"] == 0.125


@pytest.mark.parametrize(
    "rules,expected",
    [
        ([{"tower": "text"}, {"tower": "temperature"}], "no rule covers image_tower"),
        (
            [{"tower": "text"}, {"tower": "text", "part": "projection"}, {"tower": "image"}, {"tower": "temperature"}],
            "2 rules cover",
        ),
        ([{"tower": "temperature"}, {"tower": "text", "rate": 0}, {"tower": "image", "rate": 0}], "trains nothing"),
    ],
)
def test_tables_that_do_not_cover_are_refused(rules, expected):
    with pytest.raises(RequestError, match=expected):
        table(rules)


def test_no_decay_on_norms_biases_embeddings_and_temperature():
    entries = {entry.name: entry.decays for entry in table("both", SigmoidObjective())}
    assert {name for name, decays in entries.items() if decays and "embedding" in name} == set()
    parameters = dict(MODEL.named_parameters())
    for name, decays in entries.items():
        if name in parameters and parameters[name].ndim < 2:
            assert not decays, name
    assert entries["image_tower.visual_projection.weight"] and not entries["logit_bias"]


def test_optimizer_groups_carry_rate_and_decay():
    entries = table("text")
    apply_entries(MODEL, entries)
    assert not any(p.requires_grad for p in MODEL.image_tower.parameters())
    optimizer = build_optimizer(entries, stage(train="text", weight_decay=0.1), torch.device("cpu"))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in MODEL.text_tower.parameters()) + 1
    RateCurve(stage(warmup_steps=4), 20).set(optimizer, 0)
    assert all(group["lr"] == pytest.approx(1e-3 / 4) for group in optimizer.param_groups)
    MODEL.requires_grad_(True)


def test_the_curve_is_the_official_one():
    curve = RateCurve(stage(warmup_steps=4), 20)
    assert [curve(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert curve(4) == 1.0 and curve(12) == pytest.approx(0.5) and curve(19) < 0.02
    assert RateCurve(stage(schedule="constant", warmup_steps=0), 20)(19) == 1.0
    assert RateCurve(stage(final_rate=0.1, warmup_steps=0), 20)(20) == pytest.approx(0.1)


def test_a_warmup_that_never_ends_is_refused():
    with pytest.raises(RequestError, match="only 5 steps"):
        RateCurve(
            Stage.model_validate(
                {"train": "both", "epochs": 1, "batch_size": 4, "learning_rate": 1, "warmup_steps": 9}
            ),
            5,
        )


def test_unknown_tower_is_refused_by_the_recipe():
    with pytest.raises(ValueError):
        TrainRule(tower="audio")
