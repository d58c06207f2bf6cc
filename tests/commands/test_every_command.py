"""Every command once, on a tiny set, at 80 columns and a group's umask: its lines fit, and what it writes can be shared."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
import typer
from rich.cells import cell_len

import cnclip_ft
import cnclip_ft.cli
from data_tools.errors import RequestError
from tests.evaluation import tiny

SHORT = " ".join(
    f"stages.{stage}.{key}={value}"
    for stage in ("align", "contrast")
    for key, value in (("steps", 2), ("batch_size", 16), ("warmup_steps", 1), ("validate_every", 1), ("ema", "null"))
)
DATA = "data.train=official/train data.valid=official/valid"
ROAD = f"""
data demo official --train 40 --valid 12
data build official --splits valid --output built --shard-size 5
data import folder photos --output imported
data check official/train official/valid --json check.json --html check.html
data check official/train official/valid --language zh
data show imported --output sheet.png
data import table goods.csv --images photos --split 0.5,0.5 --output goods
data import table goods.csv --images photos --split 0.5,0.5 --append --output goods
data export official/train --to imagefolder --output exported-pictures
data export official/train --to webdataset --output tars
data index tars
data import table goods.csv --images photos --part 1/2 --output part-1
data import table goods.csv --images photos --part 2/2 --output part-2
data join part-1 part-2 --output joined.yaml
data check joined.yaml
plan demo model.start={{architecture:\\ tiny}} {DATA} {SHORT}
train demo model.start={{architecture:\\ tiny}} {DATA} {SHORT} output=runs/a-run-with-a-name-of-some-length save_every=1
data curate official/train BEST --near 0.9999 --fit -1 --report curate.html --list curate.jsonl --output curated
data mine BEST official/train --below 1 --output mined
plan muge_vit-b-16 model.start={{architecture:\\ tiny}} {DATA} stages.contrast.batch_size=16 stages.contrast.warmup_steps=1
evaluate BEST official/valid --json scores.json --markdown scores.md
evaluate BEST goods/valid --by 类目
evaluate BEST official/valid --swapped --json swapped.json
data demo scenes --train 12 --valid 6 --boxes
ground BEST photos/cat/0.png 红色的伞 "a red umbrella" --picture where.png --json where.json
evaluate BEST scenes/phrases/valid --grounding --json grounding.json
benchmark BEST --data sets --json benchmark.json --markdown benchmark.md
search index BEST goods/train --output goods.index
search query goods.index cat --where 类目=猫
encode BEST official/valid --output features --format jsonl
encode BEST classes.txt --output words --half
topk features features --output top.jsonl -k 3 --device cpu
classify BEST photos --classes classes.txt --json classified.json --output labels
classify BEST goods/train --by 类目 --json sorted.json
calibrate BEST official/valid --precision 0.05 --json calibrated.json --picture curve.png
tune demo model.start={{architecture:\\ tiny}} {DATA} {SHORT} --trials 1 --output searched
compare BEST LAST --split official/valid --json compared.json
average BEST LAST --judge official/valid --output averaged
export BEST --to huggingface --output exported --verify official/valid
export BEST --to cn_clip --output exported.pt
search index BEST photos --output index --approximate hnsw
search index exported photos --output exported.index
search query index 红色的圆
search query index --image photos/cat/0.png --json
scripts here
recipe list
recipe show two-stages_vit-b-16_roberta --all
recipe new mine.yaml
recipe keys
recipe keys augment --language zh
""".strip().splitlines()
ELSEWHERE = {"search serve"}  # tests/search starts it


pytestmark = pytest.mark.slow  # one road of all commands, about half a minute


@pytest.fixture(scope="module", params=[0o002])
def road(request, tmp_path_factory):
    """{command: (exit code, standard output, standard error)} of the whole road, in this process."""
    folder = tmp_path_factory.mktemp("road")
    for first, label in enumerate(("cat", "dog")):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(4):
            (folder / "photos" / label / f"{number}.png").write_bytes(tiny.png(10 * first + number))
            (folder / "photos" / label / f"{number}.txt").write_text(f"{label} {number}", encoding="utf-8")
    rows = [
        f"{label}/{number}.png,{label} {number},{kind},{number}"
        for label, kind in (("cat", "猫"), ("dog", "狗"))
        for number in range(4)
    ]
    (folder / "goods.csv").write_bytes("\r\n".join(["主图,商品标题,类目,价格", *rows, ""]).encode("gb18030"))
    (folder / "classes.txt").write_text("cat\t猫|小猫\ndog\t狗\n", encoding="utf-8")
    tiny.make_store(folder / "sets" / "flickr30k-cn" / "test")
    for label in ("cat", "dog"):
        (folder / "sets" / "imagenet" / "val" / label).mkdir(parents=True)
        (folder / "sets" / "imagenet" / "val" / label / "0.png").write_bytes(tiny.png(3))
    (folder / "sets" / "imagenet" / "classes.zh.txt").write_text("cat\t猫\ndog\t狗\n", encoding="utf-8")
    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setenv("CNCLIP_FT_CACHE", str(folder / "cache"))
        before = os.umask(request.param)
        try:
            for line in ROAD:
                told[line] = call(patch, folder, line)
        finally:
            os.umask(before)
    return folder, request.param, told


def call(patch: pytest.MonkeyPatch, folder: Path, line: str) -> tuple[int, str, str]:
    best = "runs/a-run-with-a-name-of-some-length/contrast"
    words = [{"BEST": f"{best}/best", "LAST": f"{best}/last"}.get(word, word) for word in shlex.split(line)]
    patch.setattr(sys, "argv", ["cnclip-ft", *words])
    with (folder / "out").open("w+", encoding="utf-8") as out, (folder / "err").open("w+", encoding="utf-8") as err:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code: object = 0
        try:
            cnclip_ft.cli.main()
        except SystemExit as ended:
            code = ended.code
        for stream in (out, err):
            stream.flush()
    said = [(folder / name).read_text(encoding="utf-8") for name in ("out", "err")]

    return int(str(code or 0)), said[0], said[1]


def test_every_command_is_on_the_road():
    group = typer.main.get_command(cnclip_ft.cli.app)
    names = {
        f"{name} {inner}".strip()
        for name, command in group.commands.items()
        for inner in (command.commands if hasattr(command, "commands") else [""])
    }
    missing = {name for name in names if not any(f"{line} ".startswith(f"{name} ") for line in ROAD)} - ELSEWHERE
    assert not missing, f"add a line to ROAD: {missing}"


def test_all_went_well(road):
    _, _, told = road
    wrong = {line: found for line, found in told.items() if found[0]}
    assert not wrong


def test_every_line_fits_80_columns(road):
    _, _, told = road
    wide = [
        (line.split()[:2], text)
        for line, (_, out, err) in told.items()
        for text in (out + err).split("\n")
        if cell_len(text) > 80
        and not text.startswith(("  cnclip-ft ", "{"))  # a line to type and one of JSON stay whole
    ]
    assert not wide


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_what_is_written_has_the_rights_the_umask_gives(road):
    folder, umask, _ = road
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_dir()]
    wrong = {
        str(path.relative_to(folder)): oct(mode)
        for path in files
        if (mode := stat.S_IMODE(path.stat().st_mode))
        != (0o777 if path.is_dir() or path.suffix == ".sh" else 0o666) & ~umask
        and not str(path.relative_to(folder)).startswith(("photos", "sets", "classes.txt", "goods.csv"))
    }
    assert not wrong and len(files) > 60


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_other_umasks_are_kept_to_as_well(tmp_path, umask):
    before = os.umask(umask)
    try:
        tiny.make_checkpoint(tmp_path / "model")
        tiny.make_store(tmp_path / "store")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_the_same_from_python(road, monkeypatch):
    """The run is there: trained further, judged and searched by calls."""
    folder, _, _ = road
    monkeypatch.chdir(folder)
    run = "runs/a-run-with-a-name-of-some-length"
    with pytest.raises(RequestError, match="is finished"):
        cnclip_ft.train(f"{run}/recipe.yaml", proceed=True)
    with pytest.raises(RequestError, match="stages.one: missing|train: missing"):
        cnclip_ft.train({"model": {"start": "x"}, "data": {"train": "a", "valid": "b"}, "stages": {"one": {}}})
    best = cnclip_ft.train(f"{run}/recipe.yaml", ["stages.contrast.steps=3"], proceed=True)
    assert best == Path(run, "contrast/best")
    card = cnclip_ft.evaluate(best, "official/valid", device="cpu")
    assert card.scores["valid"].mean_recall == card.as_dict()["splits"]["valid"]["mean_recall"] > 0
    assert [found.key for found in cnclip_ft.search("exported.index", image="photos/dog/1.png", top=2)][
        0
    ] == "dog/1.png"
    with pytest.raises(RequestError, match="nothing is asked"):
        cnclip_ft.search("exported.index")
