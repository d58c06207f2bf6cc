"""The folder as transformers.js and optimum expect it, by the runtimes that are out there: of this year, of 2023, in Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image

import cnclip_ft
from cnclip_ft.export import graph_files
from cnclip_ft.export.parity import TEXTS
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.dual_encoder import DualEncoder
from tests.families.cards import CARDS
from tests.models.helpers import small
from tests.official import FOLDER

SPEC = {
    "image": {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32},
    "text": {"hidden": 32, "layers": 2, "heads": 2},
    "projection": 24,
}
OF_2023 = FOLDER / "onnxruntime_2023"
NODE = shutil.which("node")


def node_is_new() -> bool:
    """What transformers.js decodes pictures with wants 20.9."""
    said = subprocess.run([NODE, "--version"], capture_output=True, text=True).stdout if NODE else "v0.0"
    return tuple(int(part) for part in said.strip().lstrip("v").split(".")[:2]) >= (20, 9)


CAPTIONS = [*TEXTS, "a"]
# transformers.js cuts the end token off with what is too long; and to its SigLIP letters outside the vocabulary are unknown, not bytes.
LONG = 4
ENGLISH = ["a red car", "a dog runs in the snow", "a"]


def checkpoint(kind: str, folder: Path) -> Path:
    if kind == "chinese_clip":
        save_checkpoint(small(SPEC), folder, info={})
    else:
        save_checkpoint(cnclip_ft.load(CARDS[kind].write(folder.with_name("theirs"))), folder, info={})
    return folder


class Folder:
    """An export, its source, and a picture that needs no resizing."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind = kind
        self.model: DualEncoder = cnclip_ft.load(checkpoint(kind, place / "a"))
        self.path = export_checkpoint(place / "a", "onnx", place / "web").output
        self.picture = place / "picture.png"
        side = self.model.image_size
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.picture)
        self.texts = self.model.encode_texts(CAPTIONS)
        self.images = self.model.encode_images([self.picture])
        self.logits = self.logits_of(self.texts)

    def logits_of(self, texts: torch.Tensor) -> torch.Tensor:
        scaled, bias = self.model.logit_scale.exp().detach() * (texts @ self.images.T), self.model.logit_bias
        return scaled if bias is None else scaled + bias.detach()

    def inputs(self) -> dict[str, np.ndarray]:
        """As transformers' own tokenizer and processor of the folder give them."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.path)
        padding = self.model.tokenizer.padding
        words = tokenizer(CAPTIONS, padding=padding, truncation=True, return_tensors="np")
        processor = transformers.AutoImageProcessor.from_pretrained(self.path)
        pictures = processor(Image.open(self.picture), return_tensors="np")
        return {**words, **pictures}


@pytest.fixture(scope="module")
def chinese(tmp_path_factory) -> Folder:
    return Folder("chinese_clip", tmp_path_factory.mktemp("chinese_clip"))


@pytest.fixture(scope="module", params=["chinese_clip", "clip", "siglip"])
def folder(request, tmp_path_factory) -> Folder:
    if request.param == "chinese_clip":
        return request.getfixturevalue("chinese")
    return Folder(request.param, tmp_path_factory.mktemp(request.param))


def unit(features: object) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(features), dim=1)


def close(found: object, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(torch.as_tensor(np.array(found), dtype=torch.float32), expected, atol=atol, rtol=0)


def test_files_names_and_shapes_are_theirs(chinese):
    assert sorted(os.listdir(chinese.path / "onnx")) == ["model.onnx", "text_model.onnx", "vision_model.onnx"]
    names = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names <= set(os.listdir(chinese.path))
    assert json.loads((chinese.path / "config.json").read_text(encoding="utf-8"))["model_type"] == "chinese_clip"
    expected = {
        "model": (
            {
                "input_ids": ["texts", "tokens"],
                "attention_mask": ["texts", "tokens"],
                "pixel_values": ["images", 3, 32, 32],
            },
            {
                "logits_per_image": ["images", "texts"],
                "logits_per_text": ["texts", "images"],
                "text_embeds": ["texts", 24],
                "image_embeds": ["images", 24],
            },
        ),
        "text_model": (
            {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]},
            {"text_embeds": ["batch", 24]},
        ),
        "vision_model": ({"pixel_values": ["batch", 3, 32, 32]}, {"image_embeds": ["batch", 24]}),
    }
    for name, (inputs, outputs) in expected.items():
        path = chinese.path / "onnx" / f"{name}.onnx"
        onnx.checker.check_model(onnx.load(path), full_check=True)
        assert onnx.load(path).ir_version == 8
        session = onnxruntime.InferenceSession(path)
        assert {value.name: value.shape for value in session.get_inputs()} == inputs
        assert {value.name: value.shape for value in session.get_outputs()} == outputs


def test_the_mask_that_is_given_is_the_one_that_counts(chinese):
    session = onnxruntime.InferenceSession(chinese.path / "onnx" / "text_model.onnx")
    ids, mask = (part.numpy() for part in chinese.model.tokenizer.pad(chinese.model.tokenizer.encode(CAPTIONS)))
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    close(unit(found), chinese.texts, 1e-6)
    mask[:, 1] = 0
    with torch.inference_mode():
        expected = chinese.model.text_features(torch.from_numpy(ids), torch.from_numpy(mask))
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    close(unit(found), expected, 1e-6)
    assert (expected - chinese.texts).abs().max() > 1e-3


@pytest.mark.slow
def test_logits_and_features_from_transformers_own_inputs(folder):
    session = onnxruntime.InferenceSession(folder.path / "onnx" / "model.onnx")
    given = folder.inputs()
    outputs = [value.name for value in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {i.name: given[i.name] for i in session.get_inputs()}), strict=True))
    close(found["text_embeds"], folder.texts)
    close(found["image_embeds"], folder.images)
    close(found["logits_per_text"], folder.logits, 1e-3)
    close(found["logits_per_image"], folder.logits.T, 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    not (OF_2023 / "onnxruntime").is_dir(),
    reason=f"onnxruntime of 2023 is not in {OF_2023} (run_scripts/test.sh installs it for -m slow, up to Python 3.11)",
)
def test_onnxruntime_of_2023(folder, tmp_path):
    code = """
import sys, numpy as np, onnxruntime
assert onnxruntime.__version__.startswith("1.16."), onnxruntime.__version__
folder, given, said = sys.argv[1:]
given, found = np.load(given), {}
for name in ("image", "text", "onnx/model", "onnx/text_model", "onnx/vision_model"):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"])
    feed = {value.name: given[value.name] for value in session.get_inputs()}
    for value, content in zip(session.get_outputs(), session.run(None, feed)):
        found[f"{name}:{value.name}"] = content
np.savez(said, **found)
"""
    pixels = folder.model.image_tower.preprocessing.decode(folder.picture)[None].numpy()
    np.savez(tmp_path / "given.npz", pixels=pixels, **folder.inputs())
    done = subprocess.run(
        [sys.executable, "-c", code, folder.path, tmp_path / "given.npz", tmp_path / "said.npz"],
        env={**os.environ, "PYTHONPATH": str(OF_2023)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "said.npz")
    for name, value in found.items():
        if "logits" not in name:
            text = "text" in name
            close(unit(value), folder.texts if text else folder.images)
    assert len(found.files) == 8
    close(found["onnx/model:logits_per_text"], folder.logits, 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    not node_is_new() or not (FOLDER / "node_modules" / "@huggingface" / "transformers").is_dir(),
    reason=f"Node.js 20.9, or transformers.js in {FOLDER / 'node_modules'}, is missing (run_scripts/test.sh installs the latter for -m slow)",
)
def test_transformers_js_in_node(folder):
    texts = ENGLISH if folder.kind == "siglip" else CAPTIONS[:LONG] + CAPTIONS[LONG + 1 :]
    script = Path(__file__).with_name("web_features.mjs")
    done = subprocess.run(
        [str(NODE), script, FOLDER.resolve(), folder.path, folder.picture, *texts],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = folder.model.encode_texts(texts)
    logits = folder.logits_of(expected)
    assert found["input_ids"] == folder.model.tokenizer.pad(folder.model.tokenizer.encode(texts))[0].tolist()
    close(found["text_embeds"], expected)
    close(found["image_embeds"], folder.images)
    close(found["logits_per_text"], logits, 1e-3)
    close(found["logits_per_image"], logits.T, 1e-3)
    if "text_alone" in found:
        close(unit(found["text_alone"]), expected)
        close(unit(found["image_alone"]), folder.images)
    row = logits[:, 0]
    scores = (row.softmax(0) if folder.model.logit_bias is None else row.sigmoid()).tolist()
    assert {entry["label"]: entry["score"] for entry in found["answers"]} == pytest.approx(
        dict(zip(texts, scores, strict=True)), abs=1e-3
    )


def test_weights_of_more_than_two_gigabytes_lie_beside_and_the_configuration_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_files, "ONE_FILE", 1000)
    folder = Folder("chinese_clip", tmp_path)
    said = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))["transformers.js_config"]
    files = ["text_model.onnx", "vision_model.onnx", "model.onnx"]
    assert said == {"use_external_data_format": dict.fromkeys(files, True)}
    assert all((folder.path / "onnx" / f"{name}_data").stat().st_size > 10_000 for name in files)
    moved = folder.path.rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(moved / "onnx" / "text_model.onnx")
    ids, mask = (part.numpy() for part in folder.model.tokenizer.pad(folder.model.tokenizer.encode(CAPTIONS)))
    close(unit(session.run(None, {"input_ids": ids, "attention_mask": mask})[0]), folder.texts, 1e-6)


def test_towers_without_a_class_there_have_our_files_alone(tmp_path):
    save_checkpoint(small({**SPEC, "pooling": "mean"}), tmp_path / "a", info={})
    done = export_checkpoint(tmp_path / "a", "onnx", tmp_path / "out")
    names = set(os.listdir(done.output))
    assert {"image.onnx", "text.onnx"} <= names and not names & {"onnx", "config.json", "preprocessor_config.json"}
