"""Another image size than the checkpoint's own is named beside every result, and is part of what two results must share."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.evaluation.thresholds.limit import read_threshold
from cnclip_ft.models.checkpoints import checkpoint_checksum, load, read_info, save_checkpoint
from data_tools.errors import RequestError
from tests.evaluation import tiny

OWN, OTHER = 32, 64
WORDS = f"pictures of {OTHER} × {OTHER}, the checkpoint's own are {OWN} × {OWN}"
SIDES = {"used": OTHER, "own": OWN}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    tiny.make_store(folder / "valid")
    for seed, name in enumerate("ab"):
        tiny.make_checkpoint(folder / name, seed)
    assert load(folder / "a").image_size == OWN
    return folder


def run(*arguments, fails: bool = False) -> str:
    """What is said, on one line."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    if fails:
        assert isinstance(done.exception, RequestError), done.exception
        return str(done.exception)
    assert done.exit_code == 0, (done.exception, done.output)
    return " ".join(done.output.split())


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("size,named", [((), False), (("--image-size", OWN), False), (("--image-size", OTHER), True)])
def test_every_result_names_it_and_says_nothing_of_the_own(place, tmp_path, size, named):
    checkpoint, store = place / "a", place / "valid"
    file, page, folder, mean = (tmp_path / name for name in ("x.json", "x.md", "features", "mean"))
    said = {"evaluate": run("evaluate", checkpoint, store, *size, "--json", file, "--markdown", page)}
    said["markdown"] = page.read_text(encoding="utf-8")
    records = [read(file)["settings"]]
    said["encode"] = run("encode", checkpoint, store, *size, "--output", folder)
    records.append(read(folder / "features.json")["settings"]["settings"])
    said["features"] = run("evaluate", folder, "--json", file)
    records.append(read(file)["settings"])
    said["compare"] = run(
        "compare", folder, checkpoint, "--split", store, "--draws", 100, "--json", tmp_path / "c.json"
    )
    records.append(read(tmp_path / "c.json")["checkpoints"][0]["settings"])
    run("calibrate", checkpoint, store, *size, "--recall", 0.9, "--json", tmp_path / "limit.json")
    records.append(read(tmp_path / "limit.json")["settings"])
    said["average"] = run("average", checkpoint, place / "b", "--judge", store, *size, "--output", mean)
    said["unjudged"] = run("average", checkpoint, place / "b", *size, "--output", mean, "--overwrite")
    records.append(read_info(mean))
    assert {name: words.count(WORDS) for name, words in said.items()} == dict.fromkeys(said, int(named))
    assert [record.get("image_size") for record in records] == [SIDES if named else None] * len(records)
    assert load(mean).image_size == (OTHER if named else OWN)


def test_a_threshold_holds_for_the_size_it_was_measured_at(place, tmp_path):
    checkpoint, store, limit = place / "a", place / "valid", tmp_path / "limit.json"
    run("calibrate", checkpoint, store, "--image-size", OTHER, "--recall", 0.9, "--json", limit)
    checksum = checkpoint_checksum(checkpoint)
    assert read_threshold(str(limit), checksum, OTHER) == read(limit)["threshold"]["cosine"]
    with pytest.raises(
        RequestError, match=f"measured on pictures of {OTHER} × {OTHER}, and here they are {OWN} × {OWN}"
    ):
        read_threshold(str(limit), checksum, OWN)
    # `data curate` and the index see pictures at the checkpoint's own.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.png").write_bytes(tiny.png(1))
    run("search", "index", checkpoint, tmp_path / "photos", "--output", tmp_path / "index")
    for command in (
        ("data", "curate", store, checkpoint, "--fit", limit, "--report", tmp_path / "x.html"),
        ("search", "query", tmp_path / "index", "猫", "--threshold", limit),
    ):
        assert f"here they are {OWN} × {OWN}" in run(*command, fails=True)


def test_a_threshold_is_not_measured_on_features_of_another_size(place, tmp_path):
    checkpoint, folder = place / "a", tmp_path / "features"
    run("encode", checkpoint, place / "valid", "--image-size", OTHER, "--output", folder)
    told = run("calibrate", checkpoint, folder, "--recall", 0.9, fails=True)
    assert f"are of pictures of {OTHER} × {OTHER}, not {OWN} × {OWN}: --image-size {OTHER}" in told
    assert WORDS in run("calibrate", checkpoint, folder, "--recall", 0.9, "--image-size", OTHER)


def test_a_checkpoint_at_another_size_has_it_as_its_own(place, tmp_path):
    save_checkpoint(load(place / "a", image_size=OTHER), tmp_path / "c", info={})
    again = load(tmp_path / "c")
    assert (again.image_size, again.own_image_size) == (OTHER, None)
    assert load(tmp_path / "c", image_size=OWN).own_image_size == OTHER
