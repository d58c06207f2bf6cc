"""Parts built one by one and joined: every command takes the description as it takes a store, with the same results."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.features.folder import read_split
from data_tools.store import open_store
from tests.evaluation import tiny


def run(*words, code=0):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    (folder / "photos").mkdir()
    rows = ["image,caption,类目"]
    for n in range(24):
        (folder / "photos" / f"{n:02d}.png").write_bytes(tiny.png(n))
        rows += [f"{n:02d}.png,东西 {n},{'鞋' if n % 3 else '包'}", f"{n:02d}.png,thing {n},"]
    (folder / "goods.csv").write_text("\n".join(rows), encoding="utf-8")
    words = ["data", "import", "table", folder / "goods.csv", "--images", folder / "photos", "--output"]
    run(*words, folder / "whole")
    for k in (1, 2, 3):
        run(*words, folder / f"part-{k}", "--part", f"{k}/3")
    said = run("data", "join", *(folder / f"part-{k}" for k in (3, 1, 2)), "--output", folder / "all.yaml")
    assert "3 stores, 24 images, 48 pairs" in said
    tiny.make_checkpoint(folder / "checkpoint")
    return folder


def test_check_show_and_export(place):
    assert "48" in run("data", "check", place / "all.yaml")
    run("data", "export", place / "all.yaml", "--to", "store", "--output", place / "one")
    one, whole = open_store(place / "one"), open_store(place / "whole")
    assert one.checksum() == whole.checksum() and one.columns == ["类目"]


def test_features_and_recall_are_those_of_one_store(place):
    scores, features = [], []
    for name in ("whole", "all.yaml"):
        run("encode", place / "checkpoint", place / name, "--output", place / f"{name}.features", "--device", "cpu")
        split = read_split(place / f"{name}.features")
        features.append(dict(zip(split.image_ids, split.image_features, strict=True)))
        file = place / f"{name}.json"
        run("evaluate", place / "checkpoint", place / name, "--json", file, "--device", "cpu", "--by", "类目")
        (scored,) = json.loads(file.read_text(encoding="utf-8"))["splits"].values()
        scores.append({key: scored[key] for key in ("mean_recall", "text_to_image", "image_to_text")})
    assert scores[0] == scores[1] and len(features[1]) == 24
    assert all(torch.allclose(features[0][key], features[1][key], atol=1e-5) for key in features[0])


def test_an_index_of_it_is_searched_and_served(place):
    for name in ("whole", "all.yaml"):
        run(
            "search",
            "index",
            place / "checkpoint",
            place / name,
            "--output",
            place / f"{name}.index",
            "--device",
            "cpu",
        )
    answers = [
        run("search", "query", place / f"{name}.index", "东西", "--json", "--where", "类目=鞋", "--device", "cpu")
        for name in ("whole", "all.yaml")
    ]
    assert answers[0] == answers[1] and answers[0].count("\n") == 10


@pytest.mark.slow
def test_it_trains(place):
    (place / "r.yaml").write_text(
        f"model: {{start: {{architecture: tiny}}}}\ndata: {{train: {place}/all.yaml, valid: {place}/all.yaml, workers: 2}}\n"
        "stages: {contrast: {train: both, epochs: 1, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 0}}\n"
        f"output: {place}/run\n",
        encoding="utf-8",
    )
    run("train", place / "r.yaml")
    assert (place / "run" / "contrast" / "best" / "model.safetensors").is_file()


def test_what_cannot_be_is_said(place):
    words = ["data", "import", "table", place / "goods.csv", "--images", place / "photos", "--output"]
    for given, problem in (
        ([*words, place / "no", "--part", "1/2", "--split", "0.5,0.5"], "--part builds one part"),
        ([*words, place / "no", "--part", "1/2", "--append"], "--part builds one part"),
        ([*words, place / "no", "--part", "1/2", "--layout", "official"], "--part builds one part"),
        ([*words, place / "no", "--part", "3/2"], "like 3/64"),
        ([*words, place / "all.yaml", "--append"], "append to one of them"),
        (
            ["data", "join", place / "part-1", place / "part-3", "--output", place / "no.yaml"],
            "1 part of 3 are missing: 2/3",
        ),
    ):
        done = CliRunner().invoke(app, [*map(str, given)])
        assert done.exit_code and problem in str(done.exception), (given, done.exception)
