"""Recipes: read, overridden, refused in words; every key is listed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import yaml

from cnclip_ft.recipe import Recipe, dump_recipe
from cnclip_ft.recipe_files import SHIPPED, complete_override, load_recipe
from cnclip_ft.recipe_keys import keys
from cnclip_ft.recipe_reference import page, rows
from cnclip_ft.yaml_file import read_yaml
from data_tools.errors import RequestError

ROOT = Path(__file__).resolve().parents[1]

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
        ("stages.align.learnin_rate=1", "learnin_rate: unknown key. Did you mean stages.align.learning_rate=1?"),
        ("learning_rate=1", "Did you mean stages.align.learning_rate=1 or stages.more.learning_rate=1?"),
        ("more.batch_size=4", "Did you mean stages.more.batch_size=4?"),
        (
            "stages.mroe.batch_size=4",
            "no stage 'mroe'; the stages are align, more. Did you mean stages.more.batch_size=4?",
        ),
        ("stages.batch_size=4", "stages.align.batch_size=4 or stages.more.batch_size=4"),
        ("stages.align.objective.colour=1", "Did you mean stages.align.augment.colour=1?"),
        ("stages.align.objective.nothing=1", "unknown key; known here: kind, positives"),
        (
            "stages.align.train=[{tower: text, rte: 0}]",
            "stages.align.train.0.rte: unknown key; known here: tower, part",
        ),
        ("start=x", "Did you mean model.start=x?"),
        ("data.trian=x", "data.trian: unknown key. Did you mean data.train=x?"),
        ("colour=1", "colour: unknown key"),
        ("stages.align.epochs=null", "give either epochs or steps"),
        ("stages.align.steps=4", "stages.align.epochs=null or stages.align.steps=null"),
        ("stages.align.batch_size=1", "greater than or equal to 2"),
        ("stages.align.train=nothing", "stages.align.train"),
        ("stages.align.train=[{tower: text, rate: 0}]", "trains nothing"),
        ("stages.align.train=[{tower: text, part: middle}]", "'middle' is not a part"),
        ("stages.align.views=2", "would be equal"),
        ("nonsense", "is not key.path=value"),
        ("seed.x.y=1", "seed has nothing inside, it is a value: seed=1"),
    ],
)
def test_refusals_name_the_key(recipe, override, expected):
    with pytest.raises(RequestError, match="r.yaml|key.path") as caught:
        load_recipe(recipe, ["stages.more={train: both, steps: 9, batch_size: 8, learning_rate: 1e-3}", override])
    assert expected in str(caught.value)


def test_an_entry_of_a_list_is_overridden(recipe):
    listed = "data.train=[{store: a}, {store: b, language: zh}]"
    loaded = load_recipe(recipe, [listed, "data.train.1.weight=3", "data.train.0=c"])
    assert [(each.store, each.weight, each.language) for each in loaded.data.train_stores()] == [
        ("c", 1, None),
        ("b", 3, "zh"),
    ]
    for wrong in ("data.train.2.weight=3", "data.train.b.weight=3"):
        with pytest.raises(RequestError, match="train is a list; its entries are 0 to 1"):
            load_recipe(recipe, [listed, wrong])


def test_a_stage_is_left_out(recipe):
    """Both ways to name it; what is set of a stage that was left out has no stage to go to."""
    more = "stages.more={train: both, steps: 9, batch_size: 8, learning_rate: 1e-3}"
    both = load_recipe(recipe, [more]).stages
    assert list(load_recipe(recipe, [more, "stages.align=null"]).stages) == [name for name in both if name != "align"]
    assert list(load_recipe(recipe, [more, "stages.more=null"]).stages) == [name for name in both if name != "more"]
    others = [f"stages.{name}=null" for name in both]
    with pytest.raises(RequestError, match="no stage is left"):
        load_recipe(recipe, [more, *others])
    with pytest.raises(RequestError, match="align.batch_size=4': stages.align=null leaves that stage out"):
        load_recipe(recipe, [more, "stages.align=null", "stages.align.batch_size=4"])
    with pytest.raises(RequestError) as refused:  # what is wrong elsewhere is what is told
        load_recipe(recipe, [more, "stages.align=null", "stages.more.learning_rate=-1"])
    assert "stages.more.learning_rate" in str(refused.value) and "align" not in str(refused.value)
    with pytest.raises(RequestError, match="there is no stage 'other'"):
        load_recipe(recipe, ["stages.other=null"])


def test_a_setting_of_a_store_that_is_its_path_alone(recipe):
    """Of a single store and of one in a list; anything else that is no section is refused."""
    for given, expected in (
        (["data.train=a place", "data.train.0.weight=2"], [("a place", 2)]),
        (["data.train=a place", "data.train.0.weight=2", "data.train.0.store=b"], [("b", 2)]),
        (["data.train=a place", "data.train.0=b"], [("b", 1)]),
        (["data.train=[a, b]", "data.train.1.weight=3"], [("a", 1), ("b", 3)]),
    ):
        loaded = load_recipe(recipe, given).data.train_stores()
        assert [(each.store, each.weight) for each in loaded] == expected
    for wrong in ("data.train.1.weight=2", "data.train.a=2", "output.0.weight=2", "data.valid.0.weight=2"):
        with pytest.raises(RequestError, match="is not a section, it holds '[a-z ]+'$"):
            load_recipe(recipe, ["data.train=a place", "data.valid=b", "output=runs", wrong])
    with pytest.raises(RequestError, match="store is not a section"):
        load_recipe(recipe, ["data.train=a place", "data.train.0.store.b=2"])


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


WRONG = [
    "seed=-1", "seed=99999999999999999999999", "seed=.inf", "seed=true", "seed=1.5",
    "model.start.image.heads=7", "model.start.image.heads=0", "model.start.image.patch=0", "model.start.image.patch=x",
    "model.start.image.layers=-1", "model.start.projection=x", "model.start.projection=-2", "model.start.image=5",
    "model.start.text.dropout=1", "model.start.text.hidden=2.5", "model.start.text.heads=true", "model.start=", "model.start=5",
    "model.image_size=0", "data.context_length=0", "data.context_length=1", "data.context_length=9999",
    "data.workers=-1", "data.workers=10000", "data.workers=many", "data.train=", "data.train=5", "data.train=[]", "data.train=[{store: a, weight: 0}]",
    "data.train=[{store: a, weight: -1}]", "data.train=[{weight: 1}]", "data.train=[{store: a, language: fr}]",
    "data.train={store: a}", "data.train.1.weight=2", "data.batches=shuffled", 'data.train="a\\0b"',
    "data.guard={max_drop: 2}", "data.guard={language: fr}", "data.valid={a: {store: x, language: fr}}",
    "data.valid={a: {language: zh}}", "best_by=fr.mean_recall", "best_by=en.r1", "data.valid={}", "data.valid={guard: a}", "data.valid=[a]", "data.max_damaged_images=-1",
    "stages={}", "stages.align=3", "stages.align.epochs=0", "stages.align.epochs=.nan", "stages.align.epochs=true",
    "stages.align.learning_rate=-1", "stages.align.learning_rate=.inf", "stages.align.learning_rate=.nan",
    "stages.align.learning_rate=0", "stages.align.learning_rate=fast", "stages.align.betas=[0.9, 1]", "stages.align.betas=[0.9]",
    "stages.align.batch_size=0", "stages.align.micro_batch_size=0", "stages.align.micro_batch_size=-4",
    "stages.align.train=[]", "stages.align.train=[3]", "stages.align.ema=1", "stages.align.warmup_steps=-1",
    "stages.align.objective.tile=0", "stages.align.kind=teach", "stages.align.teach={teacher: a, texts: b}",
    "stages.align={kind: teach, teach: {teacher: a}, train: text, steps: 3, batch_size: 2, learning_rate: 1}", "precision=fp8", "precision=true", "output=", "output=3", "log_every=0", "save_every=0",
    "report_to=wandb", "best_by=nothing", "best_by=[1]", "a..b=1", "=x", ".=1", "seed", "seed=[", "seed=&a [*a]", "seed={a: 1, a: 2}",
    "stages." + "x" * 300 + "=1",
]  # fmt: skip


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_are_one_message(tmp_path, override):
    path = tmp_path / "r.yaml"
    towers = {
        "image": {"kind": "vit", "hidden": 64, "layers": 1, "heads": 1, "patch": 8},
        "text": {"hidden": 64, "heads": 1},
    }
    start = {"start": {**towers, "projection": 32}}
    path.write_text(yaml.safe_dump(PLAIN | {"model": start}), encoding="utf-8")
    assert load_recipe(path)
    with pytest.raises(RequestError) as said:
        load_recipe(path, [override])
    key = override.partition("=")[0]
    assert key.split(".")[0] in str(said.value) and len(str(said.value).splitlines()) <= 4, said.value


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "", ".", "best", "Last", "state", "con", "a\0b", "a b", "x" * 101, "名 字"]
)
def test_names_that_are_no_stage(tmp_path, name):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"stages": {name: PLAIN["stages"]["align"]}}), encoding="utf-8")
    with pytest.raises(RequestError, match="cannot name a stage"):
        load_recipe(path)


def test_stages_that_differ_in_capitals_only(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"stages": dict.fromkeys(("align", "Align"), PLAIN["stages"]["align"])}))
    with pytest.raises(RequestError, match="capitals only"):
        load_recipe(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    "content,says",
    [
        (b"", "a recipe is a mapping"),
        (b"- 1", "a recipe is a mapping"),
        (b"\x00\x01\x02", "not readable as YAML"),
        (b"a: 1\nb: \xff\n", "line 2 is not UTF-8.*Save the recipe as UTF-8"),
        ("seed: 1".encode("utf-16"), "UTF-16.*Save the recipe as UTF-8"),
        (b"a:\n\tb: 1", "line 2, column 1"),
        (b"seed: 1\nseed: 2", "line 2: the key 'seed' stands twice .first in line 1"),
        (b"? [1, 2]\n: 3", "a key must be a word"),
        (b"a: &a\n  b: *a", "an alias that holds itself"),
        (BOMB.encode(), "more than 100,000 values"),
        (b"[" * 2000, "nested too deeply"),
        (b"x" * 1_000_001, "at most 1,000,000"),
        (b"--- 1\n--- 2", "expected a single document|but found another document"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"1: 2\n3: 4", "Keys should be strings .found 1"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, says):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=says) as said:
        load_recipe(path)
    assert str(path) in str(said.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, ".", "loop"])
def test_names_that_are_no_recipe(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RequestError, match="no such recipe file|is a folder"):
        load_recipe(name)


def test_a_byte_order_mark_dates_and_short_numbers_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(PLAIN), encoding="utf-8-sig")
    loaded = load_recipe(path, ["output=2024-13-45", "stages.align.learning_rate=1e-4", "feature_cache=2024-01-05"])
    assert (loaded.output, loaded.feature_cache, loaded.stages["align"].learning_rate) == (
        "2024-13-45",
        "2024-01-05",
        1e-4,
    )


def test_mutated_recipes_are_read_or_refused_in_words(tmp_path):
    """Values, keys and bytes changed at random; CNCLIP_FT_MUTATIONS=N tries more."""
    chance, path = random.Random(0), tmp_path / "r.yaml"
    values = [
        None,
        True,
        -1,
        0,
        10**30,
        1e400,
        float("nan"),
        "",
        "x" * 500,
        "\0",
        [],
        {},
        [[]],
        {"a": {}},
        "../..",
        "é字\u2028",
    ]

    def mutated(content):
        if isinstance(content, dict) and content and chance.random() < 0.8:
            key = chance.choice(list(content))
            new = key if chance.random() < 0.8 else chance.choice(["", "x", 1, "\0", key + "s"])
            return {(new if k == key else k): (mutated(v) if k == key else v) for k, v in content.items()}
        return chance.choice(values)

    text = (SHIPPED / "demo.yaml").read_text(encoding="utf-8")
    for number in range(int(os.environ.get("CNCLIP_FT_MUTATIONS", 300))):
        if number % 2:
            path.write_text(yaml.safe_dump(mutated(yaml.safe_load(text))), encoding="utf-8")
        else:
            spoilt = bytearray(text.encode())
            for _ in range(chance.randrange(1, 6)):
                spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
            path.write_bytes(spoilt)
        try:
            load_recipe(path)
        except RequestError as said:
            assert len(str(said)) < 5000


def test_the_shell_completes_keys_and_the_words_they_may_have():
    offered = complete_override("demo", "")
    assert {
        "data.train=",
        "stages.align.batch_size=",
        "stages.contrast.schedule=cosine",
        "compile=true",
        "compile=layers",
    } <= set(offered)
    assert complete_override("demo", "stages.contrast.sch") == [
        "stages.contrast.schedule=cosine",
        "stages.contrast.schedule=constant",
    ]
    assert "data.train=" in complete_override("no recipe", "data.t")


@pytest.mark.parametrize("language,name", [("en", "recipe.md"), ("zh", "recipe.zh-CN.md")])
def test_the_reference_holds_every_key_and_is_up_to_date(language, name):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == page(language), f"cnclip-ft recipe keys --language {language} --markdown > docs/{name}"
    assert len(rows(language)) == len(keys()) > 90 and all(all(row) for row in rows(language))
    chinese = read_yaml(ROOT / "cnclip_ft" / "recipe_keys.zh-CN.yaml")
    assert chinese.keys() == {key.path for key in keys()}


def test_every_key_of_the_schema_is_listed():
    def fields(schema, above=""):
        for name, inner in schema.get("properties", {}).items():
            yield f"{above}{name}"
            text = str(inner) + str(inner.get("default"))
            if f"{above}{name}" == "data.valid":  # kinds stand there whole
                named = next(each for each in inner["anyOf"] if each["type"] == "object")["additionalProperties"]
                for kind in named["anyOf"][1:]:
                    yield from fields(kind, "data.valid.NAME.")
            for part, way in (
                ("Stage", ".STAGE"),
                ("TrainRule", "[]"),
                ("TrainStore", "[]"),
            ):
                if f"'#/$defs/{part}'" in text:
                    yield from fields(definitions[part], f"{above}{name}{way}.")
            for part in (
                "ModelSection",
                "DataSection",
                "Guard",
                "Lora",
                "Objective",
                "Augmentation",
                "Teach",
                "Ground",
                "Distill",
                "Negatives",
            ):
                if f"'#/$defs/{part}'" in text:
                    yield from fields(definitions[part], f"{above}{name}.")

    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    assert definitions.keys() == {
        "Augmentation",
        "DataSection",
        "Distill",
        "Ground",
        "Guard",
        "Lora",
        "ModelSection",
        "Negatives",
        "Objective",
        "Stage",
        "Teach",
        "TrainRule",
        "TrainStore",
    }
    listed = {key.path for key in keys()}
    assert set(fields(schema)) == {path for path in listed if not path.startswith("model.start.")}
