"""The folder of a data set as the official script builds it, scored as it is; the result files are those of the official scripts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import cnclip_ft
from cnclip_ft.features import official_files
from cnclip_ft.features.sources import store_source
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from tests.data_tools.samples import write_official
from tests.evaluation.test_official_files import SCRIPT
from tests.official import requires_official, run_official

pytestmark = requires_official

BUILD = """
import runpy
sys.argv = ["build_lmdb_dataset.py", "--data_dir", sys.argv[1], "--splits", "train,valid,test"]
runpy.run_module("cn_clip.preprocess.build_lmdb_dataset", run_name="__main__")
"""


@pytest.fixture(scope="module")
def datapath(tmp_path_factory) -> Path:
    """``datasets/MUGE`` with its files and ``lmdb/``; no pictures are told for the test split, as MUGE is distributed."""
    root = tmp_path_factory.mktemp("DATAPATH")
    muge = root / "datasets/MUGE"
    for split, images, start in (("train", 12, 1), ("valid", 14, 100), ("test", 12, 200)):
        write_official(muge, split, images=images, captions=2, start=start)
    texts = muge / "test_texts.jsonl"
    rows = [json.loads(line) | {"image_ids": []} for line in texts.read_text(encoding="utf-8").splitlines()]
    texts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    run_official(BUILD, muge)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "tiny"
    save_checkpoint(build_start({"architecture": "tiny"}, seed=3)[0], folder, info={})
    return folder


def test_the_whole_folder_gives_the_official_result_files(datapath, checkpoint, tmp_path):
    muge, ours, theirs = datapath / "datasets/MUGE", tmp_path / "ours", tmp_path / "theirs"
    card = cnclip_ft.evaluate(checkpoint, muge, official=ours, device="cpu")
    assert list(card.scores) == ["valid", "test"]
    assert card.scores["test"].text_to_image is None and card.scores["valid"].image_to_text is not None

    theirs.mkdir()
    model, runs = cnclip_ft.load(checkpoint), []
    for split in ("valid", "test"):  # what the official scripts are given: every line of the split's two files
        source = store_source(muge / "lmdb" / split)
        rows = [json.loads(line) for line in (muge / f"{split}_texts.jsonl").read_text(encoding="utf-8").splitlines()]
        assert source.split.text_ids == [row["text_id"] for row in rows]
        features = {
            "image": (
                source.split.image_ids,
                model.encode_images([source.read(key) for key in source.split.image_ids]),
            ),
            "text": ([row["text_id"] for row in rows], model.encode_texts([row["text"] for row in rows])),
        }
        for kind, (ids, vectors) in features.items():
            official_files.write_features(
                theirs / f"{split}_{kind}.jsonl", official_files.IdFeatures(kind, ids, vectors)
            )
        files = [f"--{kind}-feats={theirs / f'{split}_{kind}.jsonl'}" for kind in ("image", "text")]
        answers = muge / f"{split}_texts.jsonl"
        if split == "valid":
            runs.append(["transform_ir_annotation_to_tr", f"--input={answers}"])
        for way, golden in (("", answers), ("_tr", answers.with_name(f"{split}_texts.tr.jsonl"))):
            lines = theirs / f"{split}{way}_predictions.jsonl"
            runs.append([f"make_topk_predictions{way}", *files, "--top-k=10", f"--output={lines}"])
            if split == "valid":
                runs.append([f"evaluation{way}", str(golden), str(lines), str(theirs / f"{split}{way}_output.json")])
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    run_official(SCRIPT, tmp_path / "runs.json")

    written = sorted(os.listdir(ours))
    assert written == sorted(name for name in os.listdir(theirs) if "predictions" in name or "output" in name)
    for name in written:
        a, b = ((folder / name).read_text(encoding="utf-8") for folder in (ours, theirs))
        assert json.loads(a) == json.loads(b) if name.endswith("output.json") else a == b, name
    assert len((ours / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 24


def test_one_split_and_what_is_no_data_set(datapath, checkpoint, tmp_path):
    muge = datapath / "datasets/MUGE"
    card = cnclip_ft.evaluate(checkpoint, muge / "lmdb/valid", device="cpu")
    assert list(card.scores) == ["valid"] and card.scores["valid"].notes == []
    with pytest.raises(RequestError, match="not a store"):
        cnclip_ft.evaluate(checkpoint, datapath)
    with pytest.raises(RequestError, match="two splits are called valid"):
        cnclip_ft.evaluate(checkpoint, muge, muge / "lmdb/valid", official=tmp_path / "results")
    assert not (tmp_path / "results").exists()
