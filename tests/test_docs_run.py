"""The shell lines and the Python of every page, run as they stand: what they name is there, small, in one working folder."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cnclip_ft.cli import app
from data_tools.store import StoreWriter, open_store
from tests.evaluation import tiny
from tests.test_docs import PAGES, ROOT, WITHOUT_EXAMPLE, lines

pytestmark = pytest.mark.slow
ELSEWHERE = {  # what is not run here → why not
    r"^(pip|bash|docker|trtexec|npx|openapi-python-client) ": "another program, which installs, downloads or needs a card",
    r"^(torchrun|accelerate) ": "several processes: tests/training",
    r"^CNCLIP_FT_KILLS=": "an attack loop of an hour",
    r"^curl |^cnclip-ft search serve|--serve( |$)": "a server, which answers until it is stopped: tests/search",
    r"tars/\{": "a hundred tars and more: tests/commands/test_shards.py",
    r"^img2dataset ": "another program, which downloads",
    r"milvus:http|^export 'CNCLIP_FT_MILVUS": "a Milvus server: tests/search/test_milvus.py",
    r"^cnclip-ft tune ": "hours; tests/tuning",
    r"DATAPATH|_feat\.jsonl|^cnclip-ft evaluate predictions": "files of the official scripts: tests/evaluation",
    r"two-stages_vit|load_from_name|benchmark ViT-B-16": "published weights: tests/training, tests/test_clip.py",
    r"--write-boxes": "a model that has learnt boxes: tests/grounding/test_box_writing.py",
    r"--to open_clip": "its text tower is none of ours: tests/export",
    r"runs/mine/recipe\.yaml --continue": "a finished run, which has nothing to continue; training.md continues one",
    r"^cnclip-ft data demo DIR$": "DIR is full here; index.md draws the same",
    r"^cnclip-ft data show .*--output": "a Chinese font, which this machine may lack: tests/data_tools",
    r"import openvino|import coremltools": "packages that are no extra of ours",
    r"class Lite": "its layers are left out: tests/models/test_towers.py",
}
TINY = """
model: {start: {architecture: tiny}}
data: {train: x, valid: x, workers: 0}
stages: {contrast: {train: both, epochs: 1, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 0}}
output: x
"""
# A model that has learnt nothing has other limits, and fits in a moment. Of an option given twice the last one holds.
SMALL = {
    "train": ["model.start={architecture: tiny}", "stages.contrast.epochs=1", "stages.contrast.batch_size=8",
              "stages.contrast.warmup_steps=0", "data.workers=0"],
    "data curate": ["--near", "0.9999", "--fit", "-1"],
    "data mine": ["--below", "1"],
    "calibrate CHECKPOINT DATA/valid": ["--precision", "0.1"],
}  # fmt: skip
SMALL["plan"] = SMALL["train"]


def elsewhere(example: str) -> bool:
    return any(re.search(pattern, example) for pattern in ELSEWHERE)


def examples(page: Path) -> list[tuple[str, str]]:
    """(kind, text) of every shell line and every Python block, in the order of the page."""
    found = []
    for kind, block in re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if kind == "python":
            found.append((kind, block))
        else:
            words = [shlex.split(line, comments=True) for line in lines(block) if "<<" not in line]
            found += [(kind, shlex.join(line)) for line in words if line]
    return found


def same(example: tuple[str, str]) -> str:
    """What two examples have in common that differ in nothing but comments."""
    return ast.dump(ast.parse(example[1])) if example[0] == "python" else example[1]


def of_both_languages(page: Path) -> list[tuple[str, str]]:
    """The examples of a page, then those that its Chinese twin alone has."""
    found, twin = examples(page), page.with_name(f"{page.stem}.zh-CN.md")
    if twin.is_file():
        known = {same(example) for example in found}
        found += [example for example in examples(twin) if same(example) not in known]
    return found


ENGLISH = [
    page for page in PAGES if not page.name.endswith(".zh-CN.md") and page.name != "guide.md"
]  # test_examples.py
RUN = [page for page in ENGLISH if any(not elsewhere(text) for _, text in of_both_languages(page))]


def test_every_page_has_an_example_that_is_run():
    assert [page.name for page in ENGLISH if page not in RUN and page.name not in WITHOUT_EXAMPLE] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in folders by category, each with a .txt; tables; DIR and DATA (train, valid, test; the official files); checkpoints."""
    place = tmp_path_factory.mktemp("docs")
    shop = place / "shop"
    before, sys.argv = sys.argv, ["draw_shop.py", str(shop), "--goods", "120"]
    try:
        runpy.run_path(str(ROOT / "examples" / "draw_shop.py"), run_name="__main__")
    finally:
        sys.argv = before
    with open(shop / "商品.csv", encoding="gb18030", newline="") as file:
        rows = list(csv.DictReader(file))
    (shop / "商品.csv").unlink()
    for row in rows:
        (shop / row["主图"]).with_suffix(".txt").write_text(row["商品标题"], encoding="utf-8")
    for name in ("PHOTOS", "photos", "图片"):
        shutil.copytree(shop, place / name)
    for name in ("dog", "cat", "a", "b", "photo"):
        shutil.copy(shop / rows[0]["主图"], place / f"{name}.jpg")
    goods = [{"图片": row["主图"], "标题": row["商品标题"], "类目": row["类目"], "价格": row["价格"]} for row in rows]
    goods[0] |= {"类目": "女装", "价格": "12.00"}
    (place / "mine.yaml").write_text(TINY, encoding="utf-8")
    write_tables(place, goods)
    run("cnclip-ft data import table goods.csv --images PHOTOS --split 0.7,0.15,0.15 --output DATA", place)
    shutil.copytree(place / "DATA", place / "DIR")
    shutil.copytree(place / "DATA" / "test", place / "DIR" / "coco-cn" / "test")
    for split in ("train", "valid"):
        run(f"cnclip-ft data export DATA/{split} --to tsv --output tsv-{split}", place)
        shutil.copytree(place / f"tsv-{split}", place / "DIR", dirs_exist_ok=True)
    shutil.copy(place / "DIR" / "valid_texts.jsonl", place)
    for number, name in enumerate(("runs/mine", "runs/shop", "runs/a", "runs/b", "runs/c")):
        tiny.make_checkpoint(place / name / "contrast" / "best", seed=number)
    shutil.copytree(place / "runs/mine/contrast/best", place / "CHECKPOINT")
    known = open_store(place / "DATA" / "valid")
    with StoreWriter(place / "boxes" / "valid") as writer:
        for pair in list(known.pairs())[:4]:
            writer.add_image(pair.image_id, known.image(pair.image_id))
            writer.add_pair(pair.image_id, pair.text_id, pair.text, "zh", beside={"boxes": [[0.2, 0.2, 0.5, 0.5]]})
        writer.finish()
    run("cnclip-ft calibrate CHECKPOINT DATA/valid --recall 0.9 --json calibration.json --workers 0", place)
    run("cnclip-ft search index CHECKPOINT PHOTOS --output photos.index", place)
    return place


def write_tables(place: Path, goods: list[dict]) -> None:
    from openpyxl import Workbook

    def table(name: str, rows: list[dict]) -> None:
        with open(place / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    table("goods.csv", goods)
    for name in ("may.csv", "june.csv", "五月.csv"):
        table(name, goods[:9])
    table("pairs.csv", [{"image": g["图片"], "text": g["标题"], "match": n % 2} for n, g in enumerate(goods)])
    (place / "sentences.tsv").write_text("en\tzh\na dog runs\t一只狗在跑\na red car\t一辆红色的车\n", encoding="utf-8")
    said = "".join(
        f'<tuv xml:lang="{code}"><seg>{text}</seg></tuv>' for code, text in (("en", "a tree"), ("zh", "一棵树"))
    )
    (place / "memory.tmx").write_text(f"<tmx><body><tu>{said}</tu></body></tmx>", encoding="utf-8")
    book = Workbook()
    for row in [list(goods[0]), *(list(row.values()) for row in goods)]:
        book.active.append(row)
    for name in ("goods.xlsx", "商品.xlsx"):
        book.save(place / name)
    (place / "val2017").mkdir()
    shutil.copy(place / "dog.jpg", place / "val2017")
    instances = {
        "images": [{"id": 1, "file_name": "dog.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [2, 2, 30, 30]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (place / "instances_val2017.json").write_text(json.dumps(instances), encoding="utf-8")
    (place / "zh.tsv").write_text("dog\t狗\n", encoding="utf-8")
    boxes = [
        {"image": row["图片"], "phrase": row["标题"], "boxes": [[0, 0, 0.5, 0.5]], "relative": True} for row in goods
    ]
    (place / "my-boxes.jsonl").write_text("\n".join(map(json.dumps, boxes)), encoding="utf-8")
    (place / "words.txt").write_text("一只狗\na red car\n", encoding="utf-8")
    (place / "classes.txt").write_text("\n".join(sorted({g["类目"] for g in goods})) + "\n", encoding="utf-8")


def run(line: str, place: Path) -> str:
    """What a command prints, in this process. A check that found something ends with 1; all else ends with 0."""
    words = shlex.split(line)
    before = os.getcwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "200"})
    finally:
        os.chdir(before)
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{line}: {result.exception}"
    assert result.exit_code in ((0, 1) if words[1:3] == ["data", "check"] else (0,)), f"{line}\n{result.output}"
    return result.output


def make_room(words: list[str], place: Path) -> None:
    """What a command would make goes where it is already, from the fixture or an earlier line: it would be refused, as it should."""
    made = [
        after for word, after in zip(words, words[1:], strict=False) if word == "--output" and "--append" not in words
    ]
    made += [word.removeprefix("output=") for word in words if word.startswith("output=")]
    made += words[3:4] if words[1:3] == ["recipe", "new"] else []
    made += ["DIR/train", "DIR/valid"] if words[1:3] == ["data", "build"] else []
    for name in made:
        there = place / name
        if there.name == "DIR":  # holds the official files too
            for split in ("train", "valid", "test"):
                shutil.rmtree(there / split, ignore_errors=True)
        elif there.is_dir():
            shutil.rmtree(there)
        else:
            there.unlink(missing_ok=True)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(folder, page, tmp_path, monkeypatch):
    place = tmp_path / "here"
    shutil.copytree(folder, place)
    monkeypatch.chdir(place)
    for kind, example in of_both_languages(page):
        if elsewhere(example):
            continue
        words = shlex.split(example) if kind == "bash" else []
        if kind == "python":
            if "cnclip_ft.train(" in example:
                shutil.rmtree(place / "runs" / "mine")
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(example, page.name, "exec"), {})
            assert bool(printed.getvalue()) == ("print(" in example)
        elif words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], cwd=place, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout, f"{example}\n{done.stdout}{done.stderr}"
        else:
            assert words[0] == "cnclip-ft", f"{page.name}: {example}: run it, or say in ELSEWHERE why not"
            make_room(words, place)
            told = " ".join(words[1:])
            for command, more in SMALL.items():
                if told.startswith(f"{command} ") and "--continue" not in words and "demo" not in words:
                    words = [*words, *more]
            run(shlex.join(words), place)


def test_what_is_run_elsewhere_stands_on_a_page():
    texts = [text for page in ENGLISH for _, text in of_both_languages(page)]
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, text) for text in texts), f"no page has {pattern}"
