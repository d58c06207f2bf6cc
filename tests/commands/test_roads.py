"""The roads a newcomer goes, with the shell, no code, at 80 columns, counted: a shop's five commands, next month's two, a researcher's two."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from rich.cells import cell_len

from data_tools.store import open_store
from tests.data_tools.samples import write_official

pytestmark = pytest.mark.slow  # minutes

ROOT = Path(__file__).resolve().parents[2]
GOODS = int(os.environ.get("CNCLIP_FT_ROAD_GOODS", "3000"))
QUICK = " ".join(
    f"stages.{stage}.{key}={value}"
    for stage, values in {
        "align": {"steps": 10, "warmup_steps": 2},
        "contrast": {"steps": 30, "warmup_steps": 5, "batch_size": 64, "validate_every": 15},
    }.items()
    for key, value in values.items()
)
SHOP = f"""
cnclip-ft data import table shop/商品.csv --images shop --split 0.8,0.1,0.1 --check --output data
cnclip-ft train demo data.train=data/train data.valid=data/valid output=runs/shop {QUICK}
cnclip-ft evaluate runs/shop/contrast/best data/test --by 类目 --json scores.json
cnclip-ft classify runs/shop/contrast/best data/test --by 类目 --json classes.json --picture confusion.png
cnclip-ft search index runs/shop/contrast/best shop --output index --serve --port 0
""".strip().splitlines()
NEXT_MONTH = f"""
cnclip-ft data import table shop/六月.csv --images shop --split 0.8,0.1,0.1 --append --output data
cnclip-ft train demo model.start=runs/shop/contrast/best data.train=data/train data.valid=data/valid output=runs/june {QUICK}
""".strip().splitlines()
SHORT = " ".join(
    f"stages.contrast.{key}={value}" for key, value in {"epochs": 1, "warmup_steps": 1, "batch_size": 8}.items()
)
RESEARCHER = f"""
cnclip-ft train muge_vit-b-16_8-gpus data.train=DATAPATH/datasets/MUGE data.valid=DATAPATH/datasets/MUGE output=runs/muge model.start='{{architecture: tiny}}' {SHORT}
cnclip-ft evaluate runs/muge/contrast/best DATAPATH/datasets/MUGE --official results
""".strip().splitlines()


def start(line: str, folder: Path) -> subprocess.Popen[str]:
    told = re.sub(r"^cnclip-ft ", f"'{sys.executable}' -m cnclip_ft ", line)
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        ["bash", "-c", f"exec {told}"],
        cwd=folder,
        env=env,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(line: str, folder: Path) -> str:
    process = start(line, folder)
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, (line, out[-2000:], err[-4000:])
    wide = [text for text in out.splitlines() if cell_len(text) > 80 and " " in text.strip()]
    assert not wide, (line, wide)
    return out


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A shop's folder, of whose table the last hundred rows come next month."""
    folder = tmp_path_factory.mktemp("shop")
    run(f"'{sys.executable}' {ROOT}/examples/draw_shop.py shop --goods {GOODS + 100}", folder)
    table = (folder / "shop" / "商品.csv").read_bytes().decode("gb18030").splitlines(keepends=True)
    (folder / "shop" / "商品.csv").write_bytes("".join(table[:-100]).encode("gb18030"))
    (folder / "shop" / "六月.csv").write_bytes("".join([table[0], *table[-150:]]).encode("gb18030"))
    return folder


def test_the_shops_road(shop):
    assert len(SHOP) <= 5
    imported, trained, scored, sorted_ = (run(line, shop) for line in SHOP[:4])
    assert "GB18030" in imported and "nothing here hurts training" in imported
    assert sum(open_store(shop / "data" / name).image_count for name in ("train", "valid", "test")) == GOODS
    assert (shop / "runs/shop/report/index.html").is_file() and "mean recall" in trained
    assert "类目" in scored or "红色" in scored
    record = json.loads((shop / "classes.json").read_text(encoding="utf-8"))
    assert record["by"] == "类目" and len(record["classes"]) == 8 and "top-1" in sorted_
    assert record["scores"]["images"] == open_store(shop / "data/test").image_count
    assert (shop / "confusion.png").read_bytes().startswith(b"\x89PNG")

    process = start(SHOP[4], shop)
    assert process.stdout is not None
    try:
        said = next(line for line in process.stdout if "http://" in line)
        found = re.search(r"http://\S+/", said)
        assert found is not None and f"{GOODS + 100:,} pictures at" in said
        with urllib.request.urlopen(found[0], timeout=60) as page:
            assert b"<html" in page.read()[:2000].lower()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_next_months_road(shop):
    if not (shop / "runs/shop").is_dir():
        pytest.skip("the shop's road comes first")
    assert len(NEXT_MONTH) <= 2
    before = {name: open_store(shop / "data" / name).image_count for name in ("train", "valid", "test")}
    added = run(NEXT_MONTH[0], shop)
    after = {name: open_store(shop / "data" / name).image_count for name in before}
    assert sum(after.values()) == sum(before.values()) + 100 and all(after[name] > before[name] for name in before)
    assert "texts stand there already on the same picture" in " ".join(added.split())
    run(NEXT_MONTH[1], shop)
    assert (shop / "runs/june/contrast/best/model.safetensors").is_file()


def test_the_researchers_road(tmp_path):
    assert len(RESEARCHER) <= 2
    for split in ("train", "valid"):
        write_official(tmp_path / "DATAPATH/datasets/MUGE", split, images=24, captions=2)
        run(
            f"cnclip-ft data build DATAPATH/datasets/MUGE --splits {split} --layout official --output DATAPATH/datasets/MUGE/lmdb",
            tmp_path,
        )
    for line in RESEARCHER:
        run(line, tmp_path)
    names = {"valid_predictions.jsonl", "valid_tr_predictions.jsonl", "valid_output.json", "valid_tr_output.json"}
    assert set(os.listdir(tmp_path / "results")) == names
    score = json.loads((tmp_path / "results/valid_output.json").read_text(encoding="utf-8"))
    assert score["success"] is True and set(score["scoreJson"]) == {"score", "mean_recall", "r1", "r5", "r10"}
    shutil.rmtree(tmp_path / "results")
