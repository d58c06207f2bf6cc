"""Parallel text: read from every form, a store like any other, checked by its languages and lengths, shown as rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cnclip_ft.cli import app
from data_tools.build import build_store
from data_tools.check import judge, measure
from data_tools.errors import DataFault, RequestError
from data_tools.faults import read_faults
from data_tools.parallel import is_parallel, language_code, read_parallel
from data_tools.sources import SourceOptions, open_source
from data_tools.sources.column_names import Columns
from data_tools.store import StoreWriter, open_store
from tests.data_tools.samples import picture

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"en": "a dog in the snow", "zh": "雪地里的狗"}, {"en": 'a "red" cat, sleeping', "zh": "睡觉的红猫"}]
THREE = {"en": "two birds", "zh": "两只鸟", "ja": "二羽の鳥"}

TMX = """<?xml version="1.0" encoding="{encoding}"?>
<!DOCTYPE tmx SYSTEM "tmx14.dtd">
<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en-US"><seg>a dog <bpt i="1">&lt;b&gt;</bpt>in<ept i="1">&lt;/b&gt;</ept> the snow</seg></tuv>
<tuv xml:lang="ZH-CN"><seg>雪地里的狗</seg></tuv></tu>
<tu><tuv lang="EN"><seg>a "red" cat, <hi>sleeping</hi></seg></tuv><tuv lang="zh"><seg>睡觉的红猫</seg></tuv></tu>
{more}</body></tmx>
"""


def written(folder: Path, kind: str) -> Path:
    file = folder / f"text.{kind}"
    if kind == "jsonl":
        lines = [
            json.dumps(ROWS[0], ensure_ascii=False),
            json.dumps({"id": "x", "translation": ROWS[1]}, ensure_ascii=False),
        ]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "tmx":
        file.write_text(TMX.format(encoding="utf-16", more=""), encoding="utf-16")
    elif kind == "csv":
        file.write_text(
            'id,English,中文\n7,a dog in the snow,雪地里的狗\n8,"a ""red"" cat, sleeping",睡觉的红猫\n',
            encoding="gb18030",
        )
    else:
        file.write_text(
            'score\ten\tzh-CN\n1\ta dog in the snow\t雪地里的狗\n2\ta "red" cat, sleeping\t睡觉的红猫\n',
            encoding="utf-8",
        )
    return file


def build(file: Path, target: Path, *, columns: tuple[str, ...] = (), **options):
    source = open_source("parallel", str(file), SourceOptions(columns=Columns(text=columns)))[""]
    return build_store(source, target, progress=False, **options)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "tmx"])
def test_every_form_gives_the_same_rows(tmp_path, kind):
    report = build(written(tmp_path, kind), tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert is_parallel(store) and read_parallel(store).rows == ROWS
    assert read_parallel(store).languages == {"en": 2, "zh": 2}
    assert [(text_id, language) for text_id, _, language in store.lone_texts][:2] == [("0:en", "en"), ("0:zh", "zh")]
    assert "parallel text, 4 texts (rows by language: en 2, zh 2)" in "\n".join(report.lines())


def test_more_than_two_languages_and_several_files(tmp_path):
    (tmp_path / "three.jsonl").write_text(json.dumps(THREE, ensure_ascii=False) + "\n", encoding="utf-8")
    source = open_source("parallel", [str(written(tmp_path, "tsv")), str(tmp_path / "three.jsonl")])[""]
    build_store(source, tmp_path / "store", progress=False)
    store = open_store(tmp_path / "store")
    assert read_parallel(store).rows == [*ROWS, THREE]
    assert {text_id: language for text_id, _, language in store.lone_texts}["2:ja"] is None  # not taken for Chinese
    build(tmp_path / "three.jsonl", tmp_path / "two", columns=("ja", "en"))
    assert read_parallel(open_store(tmp_path / "two")).rows == [{"ja": THREE["ja"], "en": THREE["en"]}]


def test_a_faulty_row_costs_itself_and_is_listed(tmp_path):
    file = tmp_path / "text.tsv"
    file.write_text("en\tzh\na dog\t狗\na cat\t\nonly\n \t\ntwo\t二\n", encoding="utf-8")
    with pytest.raises(DataFault, match=r"text.tsv:3: it has en alone; its translation is missing.*--on-error skip"):
        build(file, tmp_path / "store")
    build(file, tmp_path / "store", on_error="skip")
    assert read_parallel(open_store(tmp_path / "store")).rows == [
        {"en": "a dog", "zh": "狗"},
        {"en": "two", "zh": "二"},
    ]
    assert [(f["line"], f["kind"]) for f in read_faults(tmp_path / "store")] == [
        (3, "missing-translation"),
        (4, "bad-row"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "one\ttwo\nx\ty\n", r"fewer than two columns name a language \(found: 'one', 'two'\)"),
        ("a.tsv", "zh\tzh-CN\nx\ty\n", r"two columns are of one language \(zh, zh-CN\).*--text-column"),
        ("a.tsv", "", "is empty"),
        ("a.xml", "<a/>", "parallel text is read from .tsv"),
        ("a.tmx", "<a/>", "no TMX: it begins with <a>"),
        ("a.tmx", "<tmx><body><tu>\n<oops></tu></body></tmx>", r"a.tmx:2: this is no XML that can be read"),
        ("a.tmx", '<!DOCTYPE tmx [<!ENTITY a "b">]><tmx/>', "declares entities of its own"),
    ],
)  # fmt: skip
def test_what_is_no_parallel_text_is_refused_before_anything_is_built(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=said):
        build(tmp_path / name, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_store_of_pictures_is_none(tmp_path):
    with StoreWriter(tmp_path / "store") as writer:
        writer.add_image(1, picture(1))
        writer.add_pair(1, "1:zh", "狗", "zh")
        writer.finish()
    with pytest.raises(RequestError, match=r"holds no parallel text \(it has 1 pairs.*data import parallel"):
        read_parallel(open_store(tmp_path / "store"))


def test_names_of_languages():
    assert [
        language_code(name) for name in ("zh", "ZH_tw", "中文", "Chinese", "en-US", "ja", "xx", "text", "", "mixed")
    ] == [
        "zh",
        "zh",
        "zh",
        "zh",
        "en",
        "ja",
        None,
        None,
        None,
        None,
    ]


def test_the_check_finds_what_is_doubtful(tmp_path):
    rows = [f"sentence number {n} of many\t第{n}句话有很多字" for n in range(40)]
    rows += ["a very long sentence of which hardly anything was translated at all\t长", "same\tSame", rows[0]]
    (tmp_path / "text.tsv").write_text("en\tzh\n" + "\n".join(rows) + "\n", encoding="utf-8")
    build(tmp_path / "text.tsv", tmp_path / "store")
    report = judge([measure(open_store(tmp_path / "store"), progress=False)])
    found = report.splits[0].parallel
    assert (found.rows, found.repeated, found.untranslated, found.languages) == (43, 2, 1, {"en": 43, "zh": 43})
    assert found.doubtful == 1 and found.examples["doubtful"][0]["zh"] == "长"
    assert found.characters["zh"].least == 1 and 0.2 < found.usual["zh/en"] < 0.5
    kinds = {finding.kind: finding.hurts for finding in report.findings}
    assert kinds == {"repeated_rows": False, "untranslated_rows": False, "doubtful_rows": False}
    assert report.as_dict()["splits"][0]["parallel"]["doubtful"] == 1


def test_commands_import_check_and_show(tmp_path):
    run, store = CliRunner(), str(tmp_path / "store")
    assert (
        run.invoke(app, ["data", "import", "parallel", str(written(tmp_path, "tsv")), "--output", store]).exit_code == 0
    )
    checked = run.invoke(app, ["data", "check", store, "--html", str(tmp_path / "check.html"), "--language", "zh"])
    assert checked.exit_code == 0 and "长度可疑" in checked.output and "假负例" not in checked.output
    assert "雪地里的狗" in (tmp_path / "check.html").read_text(encoding="utf-8")
    shown = run.invoke(app, ["data", "show", store, "--first", "--rows", "1"]).output
    assert "a dog in the snow" in shown and "雪地里的狗" in shown and "cat" not in shown
    for flags in (["--append"], ["--split", "0.9,0.1"], ["--layout", "official"]):
        refused = run.invoke(app, ["data", "import", "parallel", str(tmp_path / "text.tsv"), "--output", store, *flags])
        assert refused.exit_code != 0 and "leave out --append" in str(refused.exception)


KILLED = """
import os, signal, sys
from pathlib import Path
from data_tools.build import build_store
from data_tools.sources.parallel import ParallelSource
from data_tools.store import environments
from data_tools.store.writer import StoreWriter

environments.BATCH_ITEMS = 7
at, add, seen = int(sys.argv[3]), StoreWriter.add_text, [0]
def counting(self, *arguments, **named):
    seen[0] += 1
    if seen[0] == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(self, *arguments, **named)
StoreWriter.add_text = counting
build_store(ParallelSource([Path(sys.argv[1])]), sys.argv[2], resume=True, progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_import_goes_on_and_leaves_what_an_unbroken_one_does(tmp_path):
    """Also between the languages of a row."""
    file = tmp_path / "text.tsv"
    file.write_text("en\tzh\n" + "".join(f"sentence {n}\t第{n}句\n" for n in range(60)), encoding="utf-8")
    build(file, tmp_path / "whole")
    for at in (32, 63):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(file), str(tmp_path / "store"), str(at)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert killed.returncode == -signal.SIGKILL and not (tmp_path / "store").exists()
    build(file, tmp_path / "store", resume=True)
    ours, theirs = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert (ours.checksum(), ours.order()) == (theirs.checksum(), theirs.order())
    assert len(read_parallel(ours)) == 60 and not [
        p for p in tmp_path.iterdir() if p.name not in ("text.tsv", "store", "whole")
    ]
