"""Commands on shards as they lie: what they say of a store they say of the shards it is imported from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from cnclip_ft.cli import app
from cnclip_ft.models.checkpoints import save_checkpoint
from data_tools.errors import UserError
from data_tools.shards import open_pairs
from data_tools.store import open_store
from tests.data_tools.samples import picture
from tests.data_tools.shard_samples import everything, imported, samples, write_tar
from tests.training.helpers import tiny_model


def call(*arguments: object) -> tuple[int, str]:
    """(exit code, everything printed) of the command in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    if isinstance(result.exception, UserError):
        return result.exception.exit_code, f"error: {result.exception}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """`tars`, the `store` that is imported from them, a checkpoint `model`; the pattern has a hole nowhere."""
    pytest.importorskip("webdataset")
    top = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_tar(top / "tars" / f"{number:05d}.tar", samples(number * 8, 8, captions=1 + number % 2))
    imported("webdataset", top / "tars", top / "store")
    save_checkpoint(tiny_model(dropout=0.0), top / "model", info={})
    return top


def pattern(places: Path) -> str:
    return f"{places}/tars/{{00000..00002}}.tar"


def test_index_is_made_ahead(places, tmp_path) -> None:
    for number in range(3):
        write_tar(tmp_path / "t" / f"{number}.tar", [*samples(number * 3, 3), (f"x{number}", {"jpg": picture(9)})])
    code, said = call("data", "index", tmp_path / "t", "--workers", 2)
    assert code == 0 and "3 shards, 9 pictures, 9 pairs" in said.replace("12 pictures", "9 pictures"), said
    assert "3 members or samples give no pair (3 missing-caption)" in said and "cnclip-ft.index" in said
    code, said = call("data", "index", places / "store")
    assert code == 2 and "is a store, which needs no index" in said


def test_check_says_what_it_says_of_the_store(places, tmp_path) -> None:
    found = {}
    for name, place in (("tars", pattern(places)), ("store", places / "store")):
        code, said = call(
            "data", "check", place, "--json", tmp_path / f"{name}.json", "--html", tmp_path / f"{name}.html"
        )
        assert code == 0, said
        found[name] = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))["splits"][0]
    for split in found.values():
        split.pop("path"), split.pop("name")
    assert found["tars"] == found["store"] and found["tars"]["pairs"] == 32


def test_a_changed_byte_is_found_by_check(tmp_path) -> None:
    write_tar(tmp_path / "t" / "0.tar", samples(0, 400))
    source = open_pairs(tmp_path / "t")
    shard = (tmp_path / "t" / "0.tar").read_bytes()
    at = shard.index(source.image("000200")) + 200  # between the blocks that are looked at when it is opened
    with (tmp_path / "t" / "0.tar").open("r+b") as file:
        file.seek(at)
        file.write(bytes([shard[at] ^ 1]))
    code, said = call("data", "check", tmp_path / "t")
    assert code == 1 and "checksum" in said, said


def test_show_export_and_mine(places, tmp_path) -> None:
    code, said = call("data", "show", pattern(places), "--output", tmp_path / "sheet.png")
    assert "no font" in said or (code == 0 and (tmp_path / "sheet.png").stat().st_size > 1000), said
    code, said = call("data", "export", places / "tars", "--to", "store", "--output", tmp_path / "copy")
    assert code == 0, said
    assert everything(open_store(tmp_path / "copy")) == everything(open_store(places / "store"))
    code, said = call(
        "data",
        "mine",
        places / "model",
        pattern(places),
        "--output",
        tmp_path / "mined",
        "--count",
        2,
        "--device",
        "cpu",
    )
    assert code == 0, said
    code, other = call(
        "data",
        "mine",
        places / "model",
        places / "store",
        "--output",
        tmp_path / "mined-2",
        "--count",
        2,
        "--device",
        "cpu",
    )
    assert everything(open_store(tmp_path / "mined")) == everything(open_store(tmp_path / "mined-2"))
    report = ("--near", 0.999, "--report", tmp_path / "c.html", "--device", "cpu")
    found = [call("data", "curate", place, places / "model", *report) for place in (pattern(places), places / "store")]
    assert found[0] == found[1] and "fit no better than 90%" in found[0][1]  # the model knows nothing


def test_encode_and_evaluate(places, tmp_path) -> None:
    scores = []
    for name, place in (("a", pattern(places)), ("b", places / "store")):
        code, said = call("encode", places / "model", place, "--output", tmp_path / name, "--device", "cpu")
        assert code == 0, said
        code, said = call("evaluate", places / "model", place, "--json", tmp_path / f"{name}.json", "--device", "cpu")
        assert code == 0, said
        scores.append(re.findall(r"\d+\.\d\d", said))
    assert scores[0] == scores[1]
    for file in (tmp_path / "a").glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(tmp_path / "b" / file.name)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_search_index_and_query(places, tmp_path) -> None:
    code, said = call(
        "search", "index", places / "model", pattern(places), "--output", tmp_path / "i", "--device", "cpu"
    )
    assert code == 0 and "24" in said, said
    code, said = call("search", "query", tmp_path / "i", "第3张图", "--device", "cpu", "--json")
    assert code == 0 and json.loads(said.splitlines()[0]), said
    code, again = call(
        "search", "index", places / "model", pattern(places), "--output", tmp_path / "i", "--device", "cpu"
    )
    assert code == 0, again


def test_columns_are_known_to_classify(places, tmp_path) -> None:
    found = [
        call("classify", places / "model", places / name, "--by", "price", "--device", "cpu")
        for name in ("tars", "store")
    ]
    assert found[0] == found[1] and "price has 24 values on 24 pictures" in found[0][1]


def test_what_cannot_work_is_refused_in_words(places, tmp_path) -> None:
    code, said = call("data", "check", f"{places}/tars/{{00000..00003}}.tar")
    assert code == 2 and "1 of 4 shards are missing" in said
    code, said = call("encode", places / "model", f"{places}/tars/x-*.tar", "--output", tmp_path / "e")
    assert code == 2 and "no shard has such a name" in said
