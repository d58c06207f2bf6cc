"""`own-data`: chosen by the data, trained, continued and tuned with what was chosen; bad input in words."""

from __future__ import annotations

import pytest
import yaml
from rich.cells import cell_len
from typer.testing import CliRunner

import cnclip_ft
import cnclip_ft.cli
from cnclip_ft.calls import read_recipe
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.start import build_start
from cnclip_ft.training.choosing import kind_of_start, look
from cnclip_ft.training.progress import reasons
from cnclip_ft.training.run_state import load_state
from data_tools.errors import RequestError
from tests.families.cards import CARDS
from tests.training.helpers import write_store

TINY = ["model.start={architecture: tiny}", "data.workers=0"]


def run(*arguments):
    return CliRunner().invoke(cnclip_ft.cli.app, [str(each) for each in arguments], prog_name="cnclip-ft")


def places(folder, *more):
    return [f"data.train={folder / 'train'}", f"data.valid={folder / 'valid'}", *TINY, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_store(folder / "train", images=40, captions=3, seed=0)
    write_store(folder / "valid", images=12, captions=2, seed=1)
    return folder


def test_the_plan_says_what_is_chosen_and_why(data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = places(data, f"output={tmp_path / 'run'}", "stages.contrast.steps=60")
    said = run("plan", "own-data", *given)
    assert said.exit_code == 0, said.output
    text = " ".join(said.output.split())
    assert "own-data: 120 pairs, 40 pictures; 1 × cpu; both towers new" in text
    assert "align: batch_size 16, micro_batch_size auto: at most a quarter of the 120 pairs" in text
    assert (
        "global batch 16 (split into micro-batches where it does not fit; their size is found when the stage begins)"
        in text
    )
    assert "contrast: steps" not in text and "contrast: warmup_steps 6: a tenth of 60 steps" in text
    assert all(cell_len(line) <= 80 for line in said.output.splitlines())
    shown = run("recipe", "show", "own-data", *given)
    assert yaml.safe_load(shown.output)["stages"]["align"]["batch_size"] == 16
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_what_it_chose_though_the_rules_would_now_choose_otherwise(
    data, tmp_path, monkeypatch, capsys
):
    short = ["stages.align.steps=3", "stages.contrast.steps=4", f"output={tmp_path / 'run'}"]
    assert cnclip_ft.train("own-data", places(data, *short)) == tmp_path / "run" / "contrast" / "best"
    kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text(encoding="utf-8"))
    assert kept["rules"] is None and kept["stages"]["contrast"]["batch_size"] == 16
    assert "both towers new" in (tmp_path / "run/report/index.html").read_text(encoding="utf-8")
    monkeypatch.setattr("cnclip_ft.recipe_sizes.batch_of_device", lambda facts: 8)
    assert read_recipe("own-data", places(data)).stages["align"].batch_size == 8
    more = places(data, f"output={tmp_path / 'run'}", "stages.contrast.steps=6")
    capsys.readouterr()
    assert cnclip_ft.train("own-data", more, proceed=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "chosen when the run began; what was given since counts own-data: 120 pairs, 40 pictures" in said
    assert "align: batch_size 16, micro_batch_size auto: at most a quarter of the 120 pairs" in said
    assert "至多取到 16" in " ".join(line.zh for line in reasons(load_state(tmp_path / "run/state", print)))
    again = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text(encoding="utf-8"))["stages"]["contrast"]
    assert (again["batch_size"], again["steps"]) == (16, 6)


def test_a_recipe_of_ones_own_begins_as_it(data, tmp_path):
    file = tmp_path / "mine.yaml"
    assert run("recipe", "new", file, "--from", "own-data").exit_code == 0
    assert read_recipe(file, places(data)).stages == read_recipe("own-data", places(data)).stages


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.valid=nowhere"], "data.valid: nowhere.*Pictures to judge by must not be trained on.*--split 0.9,0.1"),
        (["data.train=nowhere"], "data.train: nowhere.*data.train=PLACE"),
        (["data.train=null"], "data.train"),
        (["stages.align.learning_rat=1"], "learning_rat.*stages.align.learning_rate"),
    ],
)
def test_bad_input_in_words(given, said, data):
    with pytest.raises(RequestError, match=f"(?s){said}"):
        read_recipe("own-data", places(data, *given))


def test_too_few_pairs(data, tmp_path):
    write_store(tmp_path / "few", images=7, captions=1, seed=0)
    with pytest.raises(RequestError, match="has 7 pairs; own-data needs 8"):
        read_recipe("own-data", places(data, f"data.train={tmp_path / 'few'}"))
    write_store(tmp_path / "eight", images=8, captions=1, seed=0)
    eight = places(data, f"data.train={tmp_path / 'eight'}")
    assert read_recipe("own-data", eight).stages["align"].batch_size == 4
    assert "few negatives" not in run("plan", "own-data", *eight).output  # there are no more to be had
    warned = " ".join(run("plan", "own-data", *eight, "stages.align.batch_size=2").output.split())
    assert "batch 2 leaves few negatives; give stages.align.batch_size=4 or more" in warned


def test_visits_are_counted_not_pairs(data):
    def said(*given):
        return read_recipe("own-data", places(data, *given)).chosen[0]

    assert "40 pairs, 40 pictures" in said("data.captions=one")
    twice = f"data.train=[{{store: {data / 'train'}, weight: 2}}, {{store: {data / 'valid'}}}]"
    assert "264 pairs, 52 pictures" in said(twice)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        ("ViT-B-16", ("whole", 768)),
        ({"architecture": "tiny"}, ("new", 768)),
        ({"image": "a", "text": "a"}, ("towers", 768)),  # a new text projection
        ({"image": {"path": "a", "activation": "gelu"}, "text": "b"}, ("towers", 768)),
        ({"image": "a", "text": {"hidden": 256, "layers": 2, "heads": 4}}, ("new text", 256)),
        ({"image": {"kind": "resnet", "width": 32}, "text": "b"}, ("new image", 32)),
        ({"image": {"kind": "vit", "hidden": 128}, "text": {"hidden": 192}}, ("new", 192)),
    ],
)
def test_what_the_towers_are_to_each_other(start, found):
    assert kind_of_start(start) == found


def test_pictures_in_their_own_shape_are_not_cropped(data, tmp_path):
    """A NaFlex image tower beside a text tower it has never met; of a folder of transformers and of a checkpoint of ours."""
    CARDS["siglip2"].write(tmp_path / "naflex")
    save_checkpoint(cnclip_ft.load(tmp_path / "naflex"), tmp_path / "ours", info={})
    CARDS["clip"].write(tmp_path / "clip")
    for name, crop in (("naflex", 1), ("ours", 1), ("clip", 0.8)):
        start = f"model.start={{image: {tmp_path / name}, text: {{hidden: 32, layers: 1, heads: 2}}}}"
        given = [*places(data)[:2], "data.workers=0", start]
        recipe = read_recipe("own-data", given)
        assert recipe.stages["contrast"].augment.crop == crop
        said = run("plan", "own-data", *given, f"output={tmp_path / 'run'}")
        assert said.exit_code == 0, said.exception


@pytest.mark.parametrize(("tower", "far"), [("Stacked", True), ("plain", False), ("Stem", False)])
def test_a_network_of_convolutions_is_told_by_what_its_import_path_makes(data, tmp_path, tower, far):
    """Not so a tower whose only convolution cuts patches, or one that attends. The rules' own rate is not warned of."""
    path = f"tests.models.tower_fixture:{tower}"
    recipe = read_recipe(
        {
            "model": {"start": {"image": path, "text": "a/bert"}},
            "data": {"train": str(data / "train"), "valid": str(data / "valid")},
            "stages": {"contrast": {"train": "both", "steps": 1, "batch_size": 16, "learning_rate": 1e-4}},
        }
    )
    assert look(recipe.model, recipe.data).convolutions is far
    start = f"model.start={{image: '{path}', text: {{hidden: 16, layers: 1, heads: 2}}, projection: 8}}"
    rate = ["stages.contrast.learning_rate=1e-4", "stages.contrast.train=both"]  # 4e-4 at batch 256
    said = run("plan", "own-data", *places(data)[:2], start, f"output={tmp_path / 'run'}", "data.workers=0", *rate)
    assert said.exit_code == 0, said.output
    assert ("contrast: rate 0.0001 is high" in " ".join(said.output.split())) is not far
    # nor in a second run, which begins with the checkpoint of a first
    model, _ = build_start(
        {"image": path, "text": {"hidden": 16, "layers": 1, "heads": 2}, "projection": 8}, seed=0, trust_import=True
    )
    save_checkpoint(model, tmp_path / "first", info={})
    given = [f"model.start={tmp_path / 'first'}", f"output={tmp_path / 'second'}", "data.workers=0", *rate]
    said = run("plan", "own-data", "--trust-import", *places(data)[:2], *given)
    assert said.exit_code == 0, said.output
    assert ("contrast: rate 0.0001 is high" in " ".join(said.output.split())) is not far


@pytest.mark.parametrize(("trains", "far"), [("text", True), ("both", False)])
def test_a_second_run_tells_whether_the_image_tower_has_met_texts(data, tmp_path, trains, far):
    """By its weights, where the code that makes them may be run."""
    start = {
        "image": "tests.models.tower_fixture:Pretrained",
        "text": {"hidden": 16, "layers": 1, "heads": 2},
        "projection": 8,
    }
    read = {"train": str(data / "train"), "valid": str(data / "valid"), "workers": 0}
    stage = {"train": trains, "steps": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}
    first = cnclip_ft.train(
        {"model": {"start": start}, "data": read, "stages": {"align": stage}, "output": str(tmp_path / "first")}
    )
    given = [f"model.start={first.parent / 'last'}", *places(data)[:2]]
    contrast = read_recipe("own-data", given, trust_import=True).stages["contrast"]
    rates = {(rule.tower, rule.part): rule.rate * contrast.learning_rate for rule in contrast.train}
    if far:
        assert rates["image", "trunk"] == pytest.approx(4e-4 * (contrast.batch_size / 256) ** 0.5, rel=0.02)
    assert (max(rates.values()) > 5e-5) is far
    gentle = read_recipe("own-data", given).stages["contrast"]  # the code may not be run: as a whole model
    assert max(rule.rate for rule in gentle.train) * gentle.learning_rate < 5e-5


def test_captions_are_counted_as_they_lie(data, tmp_path):
    """However often an epoch visits a store, or whether it visits its pictures once."""
    write_store(tmp_path / "single", images=40, captions=1, seed=0)
    start = {"start": {"architecture": "tiny"}}
    for train, more, wanted in (
        ([{"store": str(tmp_path / "single"), "weight": 3}], {}, 1),
        ([{"store": str(data / "train"), "weight": 0.5}], {}, 3),
        (str(data / "train"), {"captions": "one"}, 3),
    ):
        content = {"model": start, "data": {"train": train, "valid": str(data / "valid"), **more}}
        stages = {"contrast": {"train": "both", "steps": 1, "batch_size": 2, "learning_rate": 1e-4}}
        recipe = read_recipe(content | {"stages": stages})
        assert look(recipe.model, recipe.data).captions == wanted
