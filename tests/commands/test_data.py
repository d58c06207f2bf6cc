"""`cnclip-ft data …` as a user runs it: in a process of its own, exit codes, one message, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cnclip_ft.cli import app
from data_tools.errors import UserError
from data_tools.store import open_store
from tests.data_tools.samples import picture, text_row, write_lines, write_official

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cnclip_ft", "data", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"},
        timeout=120,
    )


def call(*arguments: object) -> tuple[int, str]:
    """(exit code, everything printed) of the command in this process: much faster."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, UserError):
        return result.exception.exit_code, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_build_check_and_the_flags_of_the_official_script(tmp_path) -> None:
    write_official(tmp_path, "train")
    write_official(tmp_path, "valid", images=3, start=100)
    done = run("build", tmp_path, "--splits", "train,valid")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "12 images, 36 texts, 36 pairs" in done.stdout
    assert open_store(tmp_path / "valid").image_count == 3
    done = run("check", tmp_path, "--json", tmp_path / "c.json", "--html", tmp_path / "c.html")
    assert done.returncode == 0 and "nothing here hurts training" in done.stdout and done.stderr == "", done.stderr
    found = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert [split["images"] for split in found["splits"]] == [12, 3] and found["splits"][0]["token_lengths"]["most"] > 8
    assert "<img" in (tmp_path / "c.html").read_text("utf-8")

    code, _ = call(
        "build", "--data_dir", tmp_path, "--splits", "train", "--lmdb_dir", tmp_path / "lmdb", "--layout", "official"
    )
    assert code == 0 and open_store(tmp_path / "lmdb" / "train").layout == "official"


def test_check_fails_where_training_would_suffer(tmp_path) -> None:
    write_official(tmp_path, "train")
    write_official(tmp_path, "valid", images=3)
    assert call("build", tmp_path, "--splits", "train,valid")[0] == 0
    code, out = call("check", tmp_path / "train", tmp_path / "valid")
    assert code == 1 and "hurts: train / valid: 3 pictures are in both splits" in out


def test_import_of_a_folder_with_every_option(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(7):
        (photos / f"{number}.jpg").write_bytes(picture(number, (200, 100)))
    write_lines(
        photos / "captions.csv",
        [b"image,text", *(f"{number}.jpg,第 {number} 张".encode() for number in range(7)), b"no.jpg,x"],
    )
    code, out = call(
        "import",
        "folder",
        photos,
        "--output",
        tmp_path / "s" / "train",
        "--max-side",
        64,
        "--quality",
        70,
        "--image-format",
        "webp",
        "--shard-size",
        3,
        "--workers",
        2,
        "--on-error",
        "skip",
        "--max-faults",
        2,
        "--language",
        "zh",
    )
    assert code == 0 and "left out: 1 missing-file, 1 refused-image" in out, out
    store = open_store(tmp_path / "s" / "train")
    assert (store.shards, store.image_count, store.image("3.jpg")[8:12]) == (3, 7, b"WEBP")


def test_import_of_a_set_with_splits(tmp_path) -> None:
    for split in ("train", "valid", "test"):
        write_official(tmp_path / "in", split, images=2)
    code, out = call("import", "muge", tmp_path / "in", "--output", tmp_path / "out", "--splits", "valid,test")
    assert code == 0 and "29,806 images expected, 2 found" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "valid"]
    (tmp_path / "in" / "test_imgs.tsv").unlink()
    code, out = call("import", "muge", tmp_path / "in", "--output", tmp_path / "all")
    assert code == 0 and sorted(path.name for path in (tmp_path / "all").iterdir()) == ["train", "valid"]
    assert call("import", "muge", tmp_path / "in", "--output", tmp_path / "x", "--splits", "dev")[0] == 2


def test_import_ends_with_the_check(tmp_path) -> None:
    write_official(tmp_path / "in", images=6)
    code, out = call("import", "official", tmp_path / "in", "--output", tmp_path / "out", "--check")
    checked = call("check", tmp_path / "out" / "train")
    assert checked[1].strip() in out and code == checked[0] and "pairs" in checked[1]
    code, plain = call("import", "official", tmp_path / "in", "--output", tmp_path / "again")
    assert code == 0 and "pixel" not in plain and len(plain) < len(out)


def test_demo_and_show(tmp_path) -> None:
    code, out = call("demo", tmp_path / "d", "--train", 4, "--valid", 2)
    assert code == 0 and "4 scenes, 20 pairs" in out
    code, out = call("show", tmp_path / "d" / "train", "--output", tmp_path / "s.png")
    if code == 0:
        assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    else:
        assert code == 2 and "no font with Chinese glyphs" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["build"], 2, "name the folder and the splits"),
        (["build", "DIR"], 2, "name the folder and the splits"),
        (["build", "DIR/none", "--splits", "train"], 2, "no such folder"),
        (["build", "DIR", "--splits", "train,nope"], 2, "nope_imgs.tsv: no such file. Splits in"),
        (["build", "DIR", "--splits", "train", "--layout", "other"], 2, "--layout 'other': one of plain, official"),
        (["build", "DIR", "--splits", "train", "--shard-size", "0"], 2, "--shard-size 0: at least 1"),
        (["build", "DIR", "--splits", "train", "--max-side", "3"], 2, "--max-side 3"),
        (["build", "DIR", "--splits", "train", "--image-format", "webp"], 2, "--max-side or --quality"),
        (["build", "DIR", "--splits", "broken"], 1, "broken_texts.jsonl:2: broken JSON"),
        (["build", "DIR", "--splits", "broken", "--on-error", "skip", "--max-faults", "0"], 1, "more than 0 faults"),
        (["build", "DIR", "--splits", "train", "--output", "DIR/train_imgs.tsv"], 1, "cannot be written"),
        (["import", "folder", "DIR/none", "--output", "DIR/x"], 2, "no such folder"),
        (
            ["import", "things", "DIR", "--output", "DIR/x"],
            2,
            "source 'things' is not known; there are official, folder",
        ),
        (["import", "table", "DIR/none.csv", "--output", "DIR/x"], 2, "none.csv: no such file"),
        (
            ["import", "table", "DIR/train_imgs.tsv", "--output", "DIR/x"],
            2,
            "none of the columns is known to hold the image",
        ),
        (["check", "DIR/none"], 2, "no such folder"),
        (["check", "DIR"], 2, "is not a store"),
        (["show", "DIR"], 2, "is not a store"),
    ],
)
def test_bad_requests_and_bad_data(tmp_path, arguments: list[str], code: int, says: str) -> None:
    write_official(tmp_path, "train", images=2)
    write_official(tmp_path, "broken", images=1)
    write_lines(tmp_path / "broken_texts.jsonl", [text_row(1, "good", [1]), b'{"text_id": 2,'])
    got, out = call(*(argument.replace("DIR", str(tmp_path)) for argument in arguments))
    assert (got, says in out) == (code, True), out
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "broken.building"] or code == 1


def test_a_fault_is_one_line_without_a_traceback(tmp_path) -> None:
    write_official(tmp_path, "train", images=2)
    write_lines(tmp_path / "train_texts.jsonl", [text_row(1, "a", [1, 99])])
    done = run("build", tmp_path, "--splits", "train")
    assert done.returncode == 1 and done.stdout == ""
    fault, more = done.stderr.splitlines()
    assert (
        more == "more: docs/data.md#what-is-checked-and-what-happens-to-faults"
        and "train_texts.jsonl:1: it names image 99, which is not there" in fault
    )
    assert fault.count("--on-error skip") == 1
    assert not list(tmp_path.glob("train*/"))


def test_help_shows_an_example_of_everything() -> None:
    for command in ("build", "import", "check", "demo", "show"):
        code, out = call(command, "--help")
        assert code == 0 and f"Example: cnclip-ft data {command}" in out
