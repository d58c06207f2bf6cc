from __future__ import annotations

import pytest
import yaml

from cnclip_ft.recipe import dump_recipe, load_recipe
from data_tools.errors import RequestError

PLAIN = {
    "model": {"start": {"architecture": "tiny"}},
    "data": {"train": "a/train", "valid": "a/valid"},
    "stages": {"align": {"train": "text", "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}},
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(PLAIN), encoding="utf-8")
    return path


def test_reads_overrides_and_writes_back(recipe, tmp_path):
    loaded = load_recipe(recipe, ["stages.align.learning_rate=2e-5", "data.context_length=30", "seed=3"])
    assert (loaded.stages["align"].learning_rate, loaded.data.context_length, loaded.seed) == (2e-5, 30, 3)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(loaded), encoding="utf-8")
    assert load_recipe(again) == loaded


@pytest.mark.parametrize(
    "override,expected",
    [
        ("stages.align.learnin_rate=1", "stages.align.learnin_rate: unknown key; known here: train"),
        ("data.trian=x", "data.trian: unknown key; known here: train"),
        ("colour=1", "colour: unknown key"),
        ("stages.align.epochs=null", "give either epochs or steps"),
        ("stages.align.steps=4", "give either epochs or steps"),
        ("stages.align.batch_size=1", "greater than or equal to 2"),
        ("stages.align.train=nothing", "stages.align.train"),
        ("stages.align.train=[{tower: text, rate: 0}]", "trains nothing"),
        ("stages.align.train=[{tower: text, part: middle}]", "'middle' is not a part"),
        ("stages.align.views=2", "would be equal"),
        ("nonsense", "is not key.path=value"),
        ("seed.x.y=1", "seed: "),
    ],
)
def test_refusals_name_the_key(recipe, override, expected):
    with pytest.raises(RequestError, match="r.yaml|key.path") as caught:
        load_recipe(recipe, [override])
    assert expected in str(caught.value)


def test_warmup_longer_than_the_stage_is_refused(recipe):
    with pytest.raises(RequestError, match="warmup_steps .50. must be shorter than the stage .20 steps"):
        load_recipe(recipe, ["stages.align.epochs=null", "stages.align.steps=20", "stages.align.warmup_steps=50"])


def test_a_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(RequestError, match="Shipped recipes"):
        load_recipe("no-such-recipe")


def test_broken_yaml_is_named(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: [", encoding="utf-8")
    with pytest.raises(RequestError, match="broken.yaml: not readable as YAML"):
        load_recipe(path)
    path.write_text("- 1", encoding="utf-8")
    with pytest.raises(RequestError, match="a recipe is a mapping"):
        load_recipe(path)
