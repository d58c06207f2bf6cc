"""A family that is known by its own file alone goes through everything: training, evaluation, export and search."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cnclip_ft
from cnclip_ft.cli import app
from cnclip_ft.models import registry
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from data_tools.store import open_store
from tests.training.helpers import losses, stopped_after, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
START = {"image": {"kind": "tiles"}, "text": {"kind": "speller"}, "projection": 12}


pytestmark = pytest.mark.usefixtures("letters")


def _recipe(stores: Path, output: Path):
    rules = [{"tower": "image", "layer_decay": 0.8}, {"tower": "text", "layer_decay": 0.8}, {"tower": "temperature"}]
    data = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0, "context_length": 16}
    return tiny_recipe(
        stores,
        model={"start": START},
        align={"feature_cache": True},
        contrast={"train": rules, "micro_batch_size": 4},
        data=data,
        output=str(output),
    )


@pytest.fixture(scope="module")
def run(stores, tmp_path_factory):
    output = tmp_path_factory.mktemp("letters") / "run"
    train(_recipe(stores, output))
    return output


@pytest.fixture(scope="module")
def best(run):
    return run / "contrast" / "best"


def _cli(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_both_stages_learn_and_go_on_where_they_stopped(stores, run, tmp_path):
    whole = losses(run)
    assert len(whole) == 12 and all(np.isfinite(loss) for loss in whole.values())
    recipe = _recipe(stores, tmp_path / "run")
    assert train(recipe, **stopped_after(("align", 4))) is False
    assert train(recipe, proceed=True, **stopped_after(("contrast", 4))) is False
    assert train(recipe, proceed=True)
    assert losses(tmp_path / "run") == whole


def test_the_checkpoint_says_what_it_is_and_a_new_process_reads_it(best, letters):
    described = json.loads((best / "cnclip_ft.json").read_text(encoding="utf-8"))["model"]
    assert described["tokenizer"] == {"kind": "letters", "lower_case": True}
    assert (described["image"]["kind"], described["text"]["kind"]) == ("tiles", "speller")
    model = cnclip_ft.load(best)
    assert type(model.tokenizer) is letters.Letters
    texts = ["一只狗", "a red car, and a text that is much longer than the tower's positions"]
    code = (
        "import json, sys, tests.families.letters, cnclip_ft; "
        "print(json.dumps(cnclip_ft.load(sys.argv[1]).encode_texts(sys.argv[2:]).tolist()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(best), *texts], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model.encode_texts(texts))


def test_a_process_that_does_not_know_it_names_the_kinds_it_knows(best, monkeypatch):
    monkeypatch.setattr(registry, "_registered", [])
    with pytest.raises(RequestError, match="image.kind is 'tiles', expected: vit or resnet"):
        cnclip_ft.load(best)


def test_evaluate_and_encode(stores, best, tmp_path):
    _cli("evaluate", best, stores / "valid", "--device", "cpu", "--json", tmp_path / "scores.json")
    settings = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["settings"]
    assert settings["image_transform"]["crop"] == "centre" and settings["image_transform"]["mean"] == [0.5] * 3
    assert settings["text"]["preparation"].startswith("lower case, a token a character")
    _cli("encode", best, stores / "valid", "--output", tmp_path / "features", "--device", "cpu")
    store, model = open_store(stores / "valid"), cnclip_ft.load(best)
    images = np.load(tmp_path / "features" / "image_features.npy")
    np.testing.assert_allclose(images[0], model.encode_images([store.image(0)])[0], atol=1e-5)


def test_onnx_agrees_and_other_formats_are_refused(stores, best, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    said = _cli("export", best, "--to", "onnx", "--output", tmp_path / "onnx", "--verify", stores / "valid")
    assert "+0.00" in said
    about = json.loads((tmp_path / "onnx" / "description.json").read_text(encoding="utf-8"))
    assert "squash" not in about["image"]["resize"] and about["text"]["tokenizer"]["kind"] == "letters"
    for name in ("huggingface", "cn_clip"):
        refused = CliRunner().invoke(app, ["export", str(best), "--to", name, "--output", str(tmp_path / name)])
        assert refused.exit_code != 0 and not (tmp_path / name).exists()


def test_search_by_words_and_by_picture(stores, best, tmp_path):
    index, picture = tmp_path / "valid.index", tmp_path / "3.png"
    _cli("search", "index", best, stores / "valid", "--output", index, "--device", "cpu")
    assert _cli("search", "query", index, "一只狗", "--json", "--device", "cpu").count('"rank"') == 10
    store = open_store(stores / "valid")
    picture.write_bytes(store.image(3))
    first = json.loads(_cli("search", "query", index, "--image", picture, "--json", "--device", "cpu").splitlines()[0])
    assert str(first["id"]) == "3" and first["score"] > 0.999


# Words of one family; those that write or read its files may use them.
FAMILY_WORDS = re.compile(
    r"TextTokenizer|WordPiece|wordpiece|RobertaTower|ViTTower|ResNetTower|ChineseCLIP(?!Model\b)\w+|\[CLS\]|\[SEP\]|\[PAD\]|"
    r"(text|vision)_model\.(?!onnx)|word_embeddings|vocab_file|CONTEXT_LENGTH|ids != |min\(1000|"
    r"visual_projection|text_projection\.|_projection\"\)|endswith\([^)]*projection|visual\.conv1|resblocks"
)
KNOWING = (
    "clip.py",
    "models/families/",
    "models/formats/",
    "models/registry.py",
    "export/cn_clip.py",
    "export/huggingface.py",
)


def test_no_other_room_knows_a_family():
    package = ROOT / "cnclip_ft"
    found = [
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in sorted(package.rglob("*.py"))
        if not str(file.relative_to(package)).startswith(KNOWING)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILY_WORDS.search(line)
    ]
    assert found == []
