"""What an earlier version wrote is read, continued and searched, and gives the numbers it gave (`saved_before`).

Everything is copied to a place of its own first, as users move what they have, and asked for by commands and public names
alone: these tests hold however the modules behind them are arranged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from data_tools.store import open_store

SAVED = Path(__file__).with_name("saved_before")
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
CHECKPOINTS = EXPECTED["checkpoints"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Where the numbers were taken."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the run before
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copies parts of what was saved to a new place; the working folder is another, so no relative path leads there."""
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path / "somewhere")

    def copy(*names: str) -> Path:
        for name in names:
            shutil.copytree(SAVED / name, tmp_path / "moved" / name)
        return tmp_path / "moved"

    return copy


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same(found: object, expected: object, **tolerance: float) -> None:
    """Equal shapes and words, and numbers within the tolerance."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key], **tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, **tolerance)
    else:
        assert found == (pytest.approx(expected, **tolerance) if isinstance(expected, float) else expected)


# ---- stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "valid", "official"])
def test_a_store_holds_what_was_put_in(copied, name):
    expected, store = EXPECTED["stores"][name], open_store(copied(f"stores/{name}") / "stores" / name)
    assert [[p.image_id, p.text_id, p.text, p.language] for p in store.pairs()] == expected["pairs"]
    assert [list(lone) for lone in store.lone_texts] == expected["lone"]
    pictures = [[image_id, hashlib.sha256(store.image(image_id)).hexdigest()] for image_id in store.image_ids]
    assert pictures == expected["pictures"]
    assert store.checksum() == expected["checksum"]


def test_the_bytes_of_stores_are_those_their_manifests_know(copied):
    stores = copied("stores") / "stores"
    for together in (["train", "valid"], ["official"]):  # the last one holds pictures of the second
        command("data", "check", *(stores / name for name in together), "--json", f"{together[0]}.json")
        seen = json.loads(Path(f"{together[0]}.json").read_text(encoding="utf-8"))
        found = {split["name"]: split["checksum"] for split in seen["splits"]}
        assert found == {name: EXPECTED["stores"][name]["checksum"] for name in together}


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_the_features_it_gave(copied, name):
    place, expected = copied(f"checkpoints/{name}", "stores/valid"), CHECKPOINTS[name]
    model, store = cnclip_ft.load(place / "checkpoints" / name), open_store(place / "stores/valid")
    assert model.context_length == expected["context_length"]
    pictures = [store.image(image_id) for image_id in store.image_ids[:2]]
    for found, before in (
        (model.encode_texts(EXPECTED["texts"]), expected["texts"]),
        (model.encode_images(pictures), expected["images"]),
    ):
        torch.testing.assert_close(found, torch.tensor(before), atol=1e-5, rtol=0)


def test_a_checkpoint_reaches_the_recall_it_reached(copied):
    place = copied("checkpoints/vit", "stores/valid")
    command("evaluate", place / "checkpoints/vit", place / "stores/valid", "--json", "scores.json", "--device", "cpu")
    assert_recall("scores.json", "vit")


def assert_recall(file: str, name: str) -> None:
    found, expected = json.loads(Path(file).read_text(encoding="utf-8"))["splits"]["valid"], EXPECTED["recall"][name]
    same({key: found[key] for key in expected}, expected, rel=1e-9)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,cache",
    [
        ("first_stage", True),
        pytest.param("first_stage", False, marks=pytest.mark.slow),
        ("second_stage", False),
        ("sigmoid", False),
        ("low_rank", False),
    ],
)
def test_a_stopped_run_goes_on_as_it_would_have(copied, name, cache):
    """The losses of all steps that were left, and the recall at the end; also where its cache of features came along."""
    if name == "low_rank":
        pytest.importorskip("peft")
    place = copied("stores", "start", "checkpoints/vit", *["feature_cache"] * cache)
    with tarfile.open(SAVED / "runs" / f"{name}.tar.xz") as archive:
        archive.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    run = place / "renamed"
    (place / name).rename(run)
    before = len((run / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    start = (
        f"model.start.text={place / 'start/bert'}" if name == "sigmoid" else f"model.start={place / 'checkpoints/vit'}"
    )
    guard = [f"data.guard.split={place / 'stores/official'}"] * (name == "low_rank")
    command(
        "train",
        run / "recipe.yaml",
        "--continue",
        f"output={run}",
        f"data.train={place / 'stores/train'}",
        f"data.valid={place / 'stores/valid'}",
        f"feature_cache={place / 'feature_cache'}",
        start,
        *guard,
    )
    expected, journal = EXPECTED["runs"][name], lines(run / "journal.jsonl")[before:]
    losses = [[line["stage"], line["step"], line["loss"]] for line in journal if line["kind"] == "train"]
    same(losses, expected["losses"], rel=1e-6)
    recall = json.loads((run / "report/recall.json").read_text(encoding="utf-8"))
    rows = expected["recall"]
    if name == "first_stage":  # its second stage begins now: no validation beats its start, which it keeps
        assert rows["after contrast"]["mean_recall"] < rows["after align"]["mean_recall"]
        rows = rows | {"after contrast": rows["after align"]}
    same(recall, rows, rel=1e-9)
    assert not list(Path().iterdir())  # all went to the place it was told


# ---- features -------------------------------------------------------------------------------------------------------


def test_finished_features_are_searched_and_scored_as_they_were(copied):
    place = copied("features", "results")
    command("topk", place / "features/vit", place / "features/vit", "--output", "folders.jsonl", "--device", "cpu")
    files = [place / "features/vit" / name for name in ("valid_texts.txt_feat.jsonl", "valid_imgs.img_feat.jsonl")]
    command("topk", *files, "--output", "files.jsonl", "--device", "cpu")
    before = (place / "results/predictions.jsonl").read_bytes()
    assert Path("folders.jsonl").read_bytes() == before and Path("files.jsonl").read_bytes() == before
    for name in ("vit", "resnet"):  # the second is kept in half precision
        command("evaluate", place / "features" / name, "--json", f"{name}.json", "--device", "cpu")
        assert_recall(f"{name}.json", name)


def test_finished_features_are_those_of_the_checkpoint(copied):
    place = copied("features", "checkpoints/vit", "stores/valid")
    saved = {file: np.load(place / "features/vit" / file) for file in ("image_features.npy", "text_features.npy")}
    command(
        "encode",
        place / "checkpoints/vit",
        place / "stores/valid",
        "--output",
        place / "features/vit",
        "--overwrite",
        "--device",
        "cpu",
    )
    for file, before in saved.items():
        np.testing.assert_allclose(np.load(place / "features/vit" / file), before, atol=1e-6, rtol=0)


def test_begun_features_are_taken_up(copied, monkeypatch):
    place = copied("features", "checkpoints/vit", "stores/valid")
    monkeypatch.chdir(
        place
    )  # a beginning belongs to the very command: the same words, in a folder that may be elsewhere
    command("encode", "checkpoints/vit", "stores/valid", "--output", "features/begun", "--device", "cpu")
    about = json.loads(Path("features/begun/features.json").read_text(encoding="utf-8"))
    assert list(about["speed"]) == ["texts"]  # the pictures had been done, and were not encoded again
    for file in ("image_features.npy", "text_features.npy"):
        before = np.load(Path("features/vit") / file)
        np.testing.assert_allclose(np.load(Path("features/begun") / file), before, atol=1e-6, rtol=0)
    for file in ("image_ids.jsonl", "texts.jsonl"):
        assert Path("features/begun", file).read_bytes() == Path("features/vit", file).read_bytes()
    assert not Path("features/begun/parts").exists()


# ---- search ---------------------------------------------------------------------------------------------------------


def ask(index: Path, question: str, *more: object) -> list[list]:
    place = index.parent.parent
    said = command(
        "search",
        "query",
        index,
        question,
        "--json",
        "--device",
        "cpu",
        "--checkpoint",
        place / "checkpoints/vit",
        *more,
    )
    return [[line["id"], line["score"]] for line in map(json.loads, said.splitlines())]


@pytest.mark.parametrize("name,more", [("exact", []), ("approximate", []), ("approximate", ["--exact"])])
def test_an_index_answers_as_it_did(copied, name, more):
    if name == "approximate" and not more:
        pytest.importorskip("faiss")
    place = copied("indexes", "checkpoints/vit")
    for question, expected in EXPECTED["search"][name].items():
        same(ask(place / "indexes" / name, question, "--top", 5, *more), expected, abs=1e-4)


def test_an_index_is_brought_up_to_date(copied):
    """A picture is gone; the others are known by size and time and are not encoded again, by whatever is there now."""
    place = copied("indexes", "checkpoints/vit", "photos")
    for photo in (place / "photos").rglob("*.png"):
        photo.write_bytes(b"x" * photo.stat().st_size)  # would be found damaged, were it read
        os.utime(photo, (EXPECTED["changed"],) * 2)
    question, expected = next(iter(EXPECTED["search"]["exact"].items()))
    (place / "photos" / expected[0][0]).unlink()
    command(
        "search",
        "index",
        place / "checkpoints/vit",
        place / "photos",
        "--output",
        place / "indexes/exact",
        "--moved",
        "--device",
        "cpu",
    )
    same(ask(place / "indexes/exact", question, "--top", 4), expected[1:], abs=1e-4)
    assert len(ask(place / "indexes/exact", question, "--top", 20)) == 11


# ---- results of other commands --------------------------------------------------------------------------------------


def test_a_calibration_is_a_threshold(copied):
    place = copied("indexes", "checkpoints/vit", "results")
    found = ask(
        place / "indexes/exact",
        next(iter(EXPECTED["search"]["exact"])),
        "--top",
        12,
        "--threshold",
        place / "results/calibration.json",
    )
    assert [image_id for image_id, _ in found] == EXPECTED["above_threshold"]


def test_predictions_score_what_they_scored(copied):
    place = copied("results")
    command(
        "evaluate", place / "results/predictions.jsonl", place / "results/valid_texts.jsonl", "--json", "score.json"
    )
    same(*(json.loads(file.read_text()) for file in (Path("score.json"), place / "results/score.json")), rel=1e-12)


def test_features_compare_as_they_did(copied, monkeypatch):
    monkeypatch.chdir(copied("features"))
    command("compare", "features/vit", "features/resnet", "--draws", 100, "--json", "compared.json", "--device", "cpu")
    same(json.loads(Path("compared.json").read_text(encoding="utf-8"))["results"], EXPECTED["compared"], rel=1e-9)
