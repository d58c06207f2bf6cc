"""Norms of gradients and movement by part: against copies of the weights, with all that comes between a gradient and a weight."""

from __future__ import annotations

import pytest

from tests.training.helpers import one_stage, prepared, tiny_recipe

TABLES = {
    "both": "both",
    "a frozen trunk": [{"tower": "text"}, {"tower": "image", "part": "projection"}, {"tower": "image", "part": "rest", "rate": 0},
                       {"tower": "temperature"}],
    "some layers": [{"tower": "image", "part": "last 1", "rate": 0.1}, {"tower": "image", "part": "rest", "rate": 0},
                    {"tower": "text", "layer_decay": 0.5}, {"tower": "temperature", "rate": 0}],
    "low rank": [{"tower": "image", "lora": {"rank": 2, "alpha": 4}}, {"tower": "text", "lora": {"rank": 2, "alpha": 4}},
                 {"tower": "temperature"}],
}  # fmt: skip


def part(name):
    """Of a parameter of the tiny model, by its name alone."""
    if name.startswith("logit"):
        return "temperature"
    tower = "image" if name.startswith("image_tower.") else "text"
    projects = ".visual_projection." in name or ".text_projection." in name or name.startswith("text_tower.projection.")
    return f"{tower}_{'projection' if projects else 'trunk'}"


def by_part(tensors):
    """Norms in double precision."""
    found = {}
    for name, tensor in tensors.items():
        found[part(name)] = found.get(part(name), 0.0) + tensor.double().square().sum().item()
    return {name: square**0.5 for name, square in found.items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch_size": 2, "gradient_clip": 0.1, "weight_decay": 0.3, "ema": 0.9}]
)
def test_they_are_those_of_gradients_and_of_copies(stores, tmp_path, table, changes, monkeypatch):
    if table == "low rank":
        pytest.importorskip("peft")
    recipe = one_stage(stores, tmp_path, {"train": TABLES[table], **changes}, model={"start": {"architecture": "tiny"}})
    trainer = prepared(recipe, 0)
    trained = {entry.name: entry.parameter for entry in trainer.entries if entry.rate}
    gradients, clip = {}, trainer.context.sharding.clip

    def seen(parameters, limit):
        gradients.update({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        return clip(parameters, limit)

    monkeypatch.setattr(trainer.context.sharding, "clip", seen)
    batches = trainer.batches()
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in trained.items()}
        trainer.take(next(batches))
        trainer.settle()
        moved = by_part({name: p.detach() - before[name] for name, p in trained.items()})
        weights = by_part({name: p.detach() for name, p in trained.items()})
        done = trainer.settled.pop()
        assert done.gradient_norms == pytest.approx(by_part(gradients), rel=1e-5)
        assert sum(norm**2 for norm in done.gradient_norms.values()) ** 0.5 == pytest.approx(done.norm, rel=1e-5)
        assert done.relative_updates.keys() == weights.keys()
        for name, update in done.relative_updates.items():
            # A copy's difference is rounded to the bits of the weights.
            assert update == pytest.approx(moved[name] / weights[name], rel=1e-3, abs=1e-8), name
    towers = {"image_trunk", "image_projection", "text_trunk", "text_projection", "temperature"}
    absent = {"a frozen trunk": {"image_trunk"}, "some layers": {"image_projection", "temperature"}}
    assert weights.keys() == towers - absent.get(table, set())


def test_only_steps_that_are_logged_have_them(stores):
    recipe = tiny_recipe(stores, output=str(stores / "sparse"), log_every=2, contrast={"steps": 5})
    trainer = prepared(recipe)
    batches = trainer.batches()
    for _ in range(5):
        trainer.take(next(batches))
    trainer.settle()
    assert [bool(done.gradient_norms) for done in trainer.settled] == [False, True, False, True, True]  # and the last
    assert all(bool(done.gradient_norms) == bool(done.relative_updates) for done in trainer.settled)


def test_a_step_that_was_left_out_has_none(stores):
    recipe = tiny_recipe(stores, output=str(stores / "left-out"), contrast={"skip_bad_steps": 1})
    trainer = prepared(recipe)
    batches, whole = trainer.batches(), trainer.gradient.backward

    def poisoned(loss):
        whole(loss)
        trainer.model.text_tower.projection.weight.grad[0] = float("inf")

    trainer.take(next(batches))
    trainer.gradient.backward = poisoned
    trainer.take(next(batches))
    trainer.settle()
    good, bad = trainer.settled
    assert good.relative_updates and not bad.usable and bad.relative_updates == bad.gradient_norms == {}
