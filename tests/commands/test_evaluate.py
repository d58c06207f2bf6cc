"""The six commands, in this process (what they print and write), and one of them as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cnclip_ft.commands import calibrate, classify, compare, encode, evaluate, topk
from data_tools.errors import UserError
from data_tools.store import StoreWriter
from tests.evaluation import tiny

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (evaluate.evaluate, encode.encode, topk.topk, classify.classify, calibrate.calibrate, compare.compare)


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    for command in COMMANDS:
        app.command()(command)

    def call(*arguments, fails: type[UserError] | None = None) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if fails is not None:
            assert isinstance(result.exception, fails), (result.exception, result.output)
            return str(result.exception)
        assert result.exit_code == 0, (result.exception, result.output)
        return result.output

    return call


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.make_store(folder / "valid")
    tiny.make_store(folder / "test", images=4, answers=False, lone=3)
    for seed, name in enumerate(("a", "b")):
        tiny.make_checkpoint(folder / name, seed=seed)
    for first, label in enumerate(("cat", "dog")):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(3):
            (folder / "photos" / label / f"{number}.png").write_bytes(tiny.png(10 * first + number))
    (folder / "classes.txt").write_text("cat\t猫|小猫\ndog\t狗\n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNCLIP_FT_CACHE", str(tmp_path / "cache"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate_writes_scores_and_every_setting(run, here, tmp_path):
    out = run(
        "evaluate",
        here / "a",
        here / "valid",
        here / "test",
        "--json",
        tmp_path / "s.json",
        "--markdown",
        tmp_path / "s.md",
    )
    assert "valid · zh" in out and "text→image left out: no text of the split has a known image" in out
    record = read(tmp_path / "s.json")
    assert set(record) == {"format", "checkpoint", "settings", "versions", "splits"}
    assert record["checkpoint"]["checksum"] and record["settings"]["text"]["context_length"] == 52
    valid, test = record["splits"]["valid"], record["splits"]["test"]
    assert len(valid["checksum"]) == 64 and (valid["images"], valid["texts"], valid["pairs"]) == (12, 25, 28)
    assert set(valid["text_to_image"]) == {"r1", "r5", "r10", "mean_recall", "median_rank", "queries", "gallery"}
    assert set(valid["by_language"]) == {"en", "zh"}
    assert test["text_to_image"] is None and test["mean_recall"] is None
    assert (tmp_path / "s.md").read_text(encoding="utf-8").count("\n| ") >= 4


def test_evaluate_shows_the_published_rows_where_there_are_some(run, here):
    out = run("evaluate", here / "a", here / "valid", "--dataset", "flickr30k-cn")
    assert "nothing is published for Flickr30K-CN and the size tiny" in out


def test_encode_topk_and_both_ways_to_score(run, here, tmp_path):
    features, predictions = tmp_path / "f", tmp_path / "p.jsonl"
    out = run("encode", here / "a", here / "valid", "--output", features)
    assert "12 images and 25 texts, 32 values each" in out
    out = run(
        "topk",
        features,
        features,
        "--output",
        predictions,
        "--answers",
        features / "texts.jsonl",
        "--score",
        tmp_path / "score.json",
    )
    assert "text→image: R@1" in out and "queries without a known answer, left out: 1" in out
    first = json.loads(predictions.read_text(encoding="utf-8").split("\n")[0])
    assert len(first["image_ids"]) == 10 and set(first) == {"text_id", "image_ids"}
    score = read(tmp_path / "score.json")
    assert score["success"] is True
    run("evaluate", predictions, features / "texts.jsonl", "--json", tmp_path / "again.json")
    assert read(tmp_path / "again.json") == score
    run("evaluate", here / "a", here / "valid", "--json", tmp_path / "s.json")
    direct = read(tmp_path / "s.json")["splits"]["valid"]["text_to_image"]
    assert {key: direct[key] for key in ("r1", "r5", "r10")} == {
        key: score["scoreJson"][key] for key in ("r1", "r5", "r10")
    }
    out = run(
        "topk",
        features,
        features,
        "--direction",
        "image-text",
        "--output",
        predictions,
        "--answers",
        features / "texts.jsonl",
    )
    assert "image→text: R@1" in out


def test_search_within_one_kind(run, here, tmp_path):
    run("encode", here / "a", here / "photos", "--output", tmp_path / "f")
    run(
        "topk",
        tmp_path / "f",
        tmp_path / "f",
        "--direction",
        "image-image",
        "-k",
        "2",
        "--scores",
        "--output",
        tmp_path / "p.jsonl",
    )
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["scores"][0] == pytest.approx(1) and len(line["image_ids"]) == 2 for line in lines)
    assert "--score needs --answers" in run("topk", "x", "y", "--output", "z", "--score", "s", fails=UserError)


def test_classify(run, here, tmp_path):
    out = run(
        "classify",
        here / "a",
        here / "photos",
        "--classes",
        here / "classes.txt",
        "--templates",
        "zh+en",
        "--output",
        tmp_path / "o.jsonl",
        "--json",
        tmp_path / "c.json",
    )
    assert "top-1" in out and "mean per class" in out
    record = read(tmp_path / "c.json")
    assert (
        record["classes"] == {"cat": ["猫", "小猫"], "dog": ["狗"]}
        and sum(map(sum, record["scores"]["confusion"])) == 6
    )
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(line["classes"][0]["class"] == line["label"] for line in lines)
    assert record["scores"]["top1"] == pytest.approx(100 * right / 6)
    assert sum(found["share"] for found in lines[0]["classes"]) == pytest.approx(1, abs=1e-5)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_calibrate_from_a_split_and_from_labelled_pairs(run, here, tmp_path):
    out = run("calibrate", here / "a", here / "valid", "--recall", "0.9", "--json", tmp_path / "c.json")
    assert "28 matching and" in out and "softmax" in out
    found = read(tmp_path / "c.json")["threshold"]
    assert found["recall"] >= 0.9 and found["wanted"] == "recall 0.9"
    run("encode", here / "a", here / "valid", "--output", tmp_path / "f")
    assert out.split("\n")[1] == run("calibrate", here / "a", tmp_path / "f", "--recall", "0.9").split("\n")[1]
    assert "another model" in run("calibrate", here / "b", tmp_path / "f", "--recall", "0.9", fails=UserError)
    (tmp_path / "p.csv").write_text("image,text,match\ncat/0.png,猫,1\ndog/0.png,猫,0\n", encoding="utf-8")
    out = run("calibrate", here / "a", tmp_path / "p.csv", "--images", here / "photos", "--recall", "1")
    assert "1 matching and 1 other pairs" in out
    assert "is not in" in run("calibrate", here / "a", tmp_path / "p.csv", "--recall", "1", fails=UserError)


def test_compare(run, here, tmp_path):
    out = run(
        "compare", here / "a", here / "b", "--split", here / "valid", "--draws", "200", "--json", tmp_path / "c.json"
    )
    assert "mean recall" in out and "12 images of valid, 200 draws" in out
    differences = read(tmp_path / "c.json")["results"][0]["differences"]
    assert len(differences) == 7 and all(d["low"] <= d["difference"] <= d["high"] for d in differences)
    run("evaluate", here / "a", here / "valid", "--json", tmp_path / "s.json")
    assert "not overwritten" in run(
        "evaluate", here / "a", here / "valid", "--json", tmp_path / "c.json", fails=UserError
    )
    assert "not overwritten" in run(
        "compare", here / "a", here / "b", "--split", here / "valid", "--json", tmp_path / "s.json", fails=UserError
    )
    for name in ("a", "b"):
        run("encode", here / name, here / "valid", "--output", tmp_path / name)
    again = run("compare", tmp_path / "a", tmp_path / "b", "--draws", "200")
    assert again.split("\n\n")[1] == out.split("\n\n")[1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("evaluate", "{a}"), "name at least one split"),
        (("evaluate", "{a}", "nowhere"), "nowhere"),
        (("evaluate", "no-such-model", "{valid}"), "no-such-model"),
        (("evaluate", "{a}", "{valid}", "--dtype", "float8"), "float8"),
        (("evaluate", "{a}", "{valid}", "--dataset", "imagenet"), "imagenet"),
        (("evaluate", "{a}", "{valid}", "--memory", "lots"), "lots"),
        (("encode", "{a}", "{valid}", "--output", "f", "--format", "csv"), "csv"),
        (
            ("encode", "{a}", "{valid}", "--output", "f", "--on-error", "go"),
            "--on-error 'go': one of report, skip, fail",
        ),
        (("topk", "x.npy", "y.npy", "--output", "p.jsonl"), "x.npy: no such file"),
        (("topk", "x.npy", "y.npy", "--output", "p.jsonl", "--direction", "up"), "up"),
        (("classify", "{a}", "{valid}", "--classes", "none.txt"), "none.txt cannot be read"),
        (("calibrate", "{a}", "{valid}"), "either --precision or --recall"),
        (("calibrate", "{a}", "{valid}", "--recall", "0.5", "--share", "2"), "--share is 2"),
        (("compare", "{a}", "--split", "{valid}"), "at least two"),
        (("compare", "{a}", "{b}"), "say --split"),
    ],
)
def test_wrong_requests_are_refused_with_what_to_change(run, here, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(a=here / "a", b=here / "b", valid=here / "valid") for argument in arguments]
    assert said in run(*filled, fails=UserError)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])


def test_every_help_has_an_example(run):
    for name in (command.__name__ for command in COMMANDS):
        assert f"Example: cnclip-ft {name} " in " ".join(run(name, "--help").split())


def test_the_commands_import_nothing_heavy():
    code = "import sys, cnclip_ft.cli; print([m for m in ('torch', 'numpy', 'lmdb', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_from_the_shell(here, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUTF8="1")

    def start(*arguments):
        command = [sys.executable, "-m", "cnclip_ft", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")

    done = start("evaluate", here / "a", here / "valid", "--json", "s.json")
    assert done.returncode == 0 and "mean recall" in done.stdout, done.stderr
    wrong = start("evaluate", here / "a", "nowhere")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Pictures with a category that people wrote: in two widths, rarely, not at all."""
    path = tmp_path_factory.mktemp("shop") / "goods"
    kinds = ["T恤", "Ｔ恤", "t恤 ", "T恤", "女装", "女装", "女装", "女装", "女装", "帽子", None, "  "]
    with StoreWriter(path) as writer:
        for number, kind in enumerate(kinds):
            columns = {"价格": 10 * number, "备注": f"n{number}"} | ({} if kind is None else {"类目": kind})
            writer.add_image(number, tiny.png(number), columns=columns)
            writer.add_pair(number, number, f"商品 {number}", "zh")
        writer.finish()
    return path


def test_classify_by_a_column(run, here, shop, tmp_path):
    files = ("--json", tmp_path / "c.json", "--output", tmp_path / "o.jsonl")
    out = run("classify", here / "a", shop, "--by", "类目", "--picture", tmp_path / "c.svg", *files)
    said = " ".join(out.split())
    assert "classes: the 3 values of 类目" in said
    assert "2 pictures have no value in 类目: classified, not scored" in said
    assert "spellings of one value were put together: 'T恤' = 'Ｔ恤' = 't恤'" in said
    assert "2 classes have fewer than 5 pictures, so their accuracy says little: T恤, 帽子; --least 5" in said
    record = read(tmp_path / "c.json")
    assert record["classes"] == {"女装": ["女装"], "T恤": ["T恤"], "帽子": ["帽子"]} and record["by"] == "类目"
    assert record["scores"]["counts"] == {"女装": 5, "T恤": 4, "帽子": 1}
    assert [sum(row) for row in record["scores"]["confusion"]] == [5, 4, 1]
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["T恤"] * 4 + ["女装"] * 5 + ["帽子", None, None]
    right = sum(line["classes"][0]["class"] == line["label"] for line in lines)
    assert record["scores"]["top1"] == pytest.approx(100 * right / 10)
    assert "女装" in (tmp_path / "c.svg").read_text(encoding="utf-8") or "no font with Chinese glyphs" in said

    out = run("classify", here / "a", shop, "--by", "类目", "--least", "2", "--where", "价格>=20", *files)
    record = read(tmp_path / "c.json")
    assert record["scores"]["counts"] == {"女装": 5, "t恤": 2} and record["where"] == "价格>=20"
    assert "1 values with fewer than 2 pictures are no classes" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "Give --by COLUMN"),
        (("--by", "类目", "--classes", "{classes}"), "one of the two"),
        (("--by", "类"), "keeps no column '类'; did you mean '类目'?"),
        (("--by", "类目", "--where", "价格>1000"), "no picture meets --where 价格>1000"),
        (("--by", "类目", "--where", "类目=帽子"), "类目 has 1 value with 1 or more pictures"),
    ],
)
def test_classify_by_a_column_refuses(run, here, shop, arguments, said):
    given = [part.format(classes=here / "classes.txt") for part in arguments]
    assert said in run("classify", here / "a", shop, *given, fails=UserError)
    assert "needs a store" in run("classify", here / "a", here / "photos", "--by", "类目", fails=UserError)


def test_a_column_that_sets_every_picture_apart_is_no_category(run, here, tmp_path):
    with StoreWriter(tmp_path / "goods") as writer:
        for number in range(30):
            writer.add_image(number, tiny.png(number), columns={"货号": f"n{number}", "类目": "ab"[number % 2]})
            writer.add_pair(number, number, f"商品 {number}", "zh")
        writer.finish()
    said = run("classify", here / "a", tmp_path / "goods", "--by", "货号", fails=UserError)
    assert "货号 has 30 values on 30 pictures: that is no category. Name another column with --by: 类目" in said


def test_official_result_files_are_those_of_topk(run, here, tmp_path):
    out = run("evaluate", here / "a", here / "valid", here / "test", "--official", tmp_path / "r")
    assert "official result files of valid, test in" in " ".join(out.split())
    run("encode", here / "a", here / "valid", "--output", tmp_path / "f")
    for direction, name in (("text-image", "predictions"), ("image-text", "tr_predictions")):
        run("topk", tmp_path / "f", tmp_path / "f", "--direction", direction, "--output", tmp_path / "p.jsonl")
        assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "r" / f"valid_{name}.jsonl").read_bytes()
    score = read(tmp_path / "r" / "valid_output.json")
    run("evaluate", here / "a", here / "valid", "--json", tmp_path / "s.json")
    ours = read(tmp_path / "s.json")["splits"]["valid"]["text_to_image"]
    assert score["scoreJson"]["r10"] == pytest.approx(ours["r10"], abs=1e-6)
    assert not (tmp_path / "r" / "test_output.json").exists()  # its answers are not known
    assert (tmp_path / "r" / "test_predictions.jsonl").is_file()
    run("evaluate", here / "a", here / "valid", "--official", tmp_path / "r")  # written again
    (tmp_path / "r" / "valid_output.json").write_text("mine", encoding="utf-8")
    said = run("evaluate", here / "a", here / "valid", "--official", tmp_path / "r", fails=UserError)
    assert "is not an official score file" in said
    said = run("evaluate", here / "a", here / "valid", "--official", here / "a", fails=UserError)
    assert "lies inside" in said and not list((here / "a").glob("*.jsonl"))
    assert "two splits are called valid" in run(
        "evaluate", here / "a", here / "valid", here / "valid", "--official", tmp_path / "q", fails=UserError
    )
