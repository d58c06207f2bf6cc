"""ONNX exports: both encoders as files, checked against the source, in three precisions."""

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

from cnclip_ft.cli import main
from cnclip_ft.export import graph_files
from cnclip_ft.export import onnx as writer
from cnclip_ft.export import quantise as quantising
from cnclip_ft.export.graph import ImageEncoder, TextEncoder
from cnclip_ft.export.onnx_encoder import OnnxEncoder
from cnclip_ft.export.quantise import quantise
from cnclip_ft.export.run import export_checkpoint, points_lost
from cnclip_ft.models.checkpoints import save_checkpoint
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError, UserError
from tests.evaluation.tiny import make_store
from tests.models.helpers import pixels, small

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"hidden": 32, "layers": 1, "heads": 2}
IMAGE = {"kind": "vit", "hidden": 32, "layers": 2, "heads": 2, "patch": 8, "image_size": 32}
SPEC = {"image": IMAGE, "text": TEXT, "projection": 24}
CAPTIONS = ["狗", "一只在雪地里奔跑的狗", "a red car", "“引号”里的字 " + "很长的句子" * 20]


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return small(SPEC)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "a"
    save_checkpoint(model, folder, info={"step": 3})
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "valid")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    """The graphs that `exported` was cut from."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def exported(checkpoint, graphs, tmp_path_factory):
    write = writer.write_graph

    def keep(*given):
        write(*given)
        shutil.copy(given[-1], graphs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_graph", keep)
        return export_checkpoint(checkpoint, "onnx", tmp_path_factory.mktemp("out") / "onnx")


def encode(folder: Path, model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of what was written, of three pictures and four texts."""
    encoder = OnnxEncoder(folder)
    images = encoder.image_features(pixels(model.image_size))
    texts = encoder.text_features(*encoder.tokenizer.pad(encoder.tokenizer.encode(CAPTIONS)))
    return images, texts


def source(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return model.image_features(pixels(model.image_size)), model.encode_texts(CAPTIONS)


def furthest(folder: Path, model: DualEncoder) -> float:
    return max((a - b).abs().max().item() for a, b in zip(encode(folder, model), source(model), strict=True))


def test_the_folder_is_complete_and_says_what_it_takes(exported, model):
    assert exported.difference < 1e-6 and "opset 18" in exported.advice
    files = {"image.onnx", "text.onnx", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "description.json"}
    others = {"onnx", "config.json", "preprocessor_config.json"}  # tests/export/test_web_layout.py
    assert set(os.listdir(exported.output)) == files | others | {"example.py", "README.md"}
    assert f"python {exported.output.name}/example.py" in (exported.output / "README.md").read_text(encoding="utf-8")
    about = json.loads((exported.output / "description.json").read_text(encoding="utf-8"))
    assert (about["opset"], about["dtype"], about["source"], about["quantisation"]) == (18, "float32", "a", None)
    assert about["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    assert about["image"]["shape"] == ["batch", 3, 32, 32] and "bicubic" in about["image"]["resize"]
    assert about["text"]["context_length"] == 52
    for side, kind in (("image", "tensor(uint8)"), ("text", "tensor(int64)")):
        graph = onnx.load(exported.output / about[side]["file"])
        assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 18
        assert graph.ir_version == 8  # runtimes of 2023
        (put_in,) = onnxruntime.InferenceSession(str(exported.output / about[side]["file"])).get_inputs()
        assert (put_in.name, put_in.type, put_in.shape) == (about[side]["input"], kind, about[side]["shape"])


def test_batch_and_text_length_are_open_and_padding_changes_nothing(exported, model):
    assert furthest(exported.output, model) < 1e-6
    encoder, (_, expected) = OnnxEncoder(exported.output), source(model)
    ids = encoder.tokenizer.encode(CAPTIONS)
    for row, tokens in enumerate(ids):
        for length in (len(tokens), len(tokens) + 9):
            found = encoder.text_features(*encoder.tokenizer.pad([tokens], length))
            torch.testing.assert_close(found[0], expected[row], atol=1e-6, rtol=0)
    many = encoder.image_features(pixels(32, 17))
    assert many.shape == (17, 24)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(17))
    torch.testing.assert_close(encoder.image_features(pixels(32, 17)[4:5])[0], many[4], atol=1e-6, rtol=0)


def test_only_the_token_that_is_read_goes_through_the_last_layer(exported):
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported.output / "text.onnx")).graph
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    inner = [shapes[node.output[0]] for node in graph.node if node.op_type == "Erf"]
    assert [shape[1:] for shape in inner] == [[1, 128]]


def test_example_runs_with_four_packages_and_gives_our_cosines(exported, model, tmp_path):
    from PIL import Image

    picture = tmp_path / "picture.png"
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(picture)
    block = "import sys\nfor name in ('torch', 'transformers', 'cnclip_ft'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(block, encoding="utf-8")  # an import of them fails
    done = subprocess.run(
        [sys.executable, exported.output / "example.py", picture, *CAPTIONS[:3]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    cosines = [float(part.rsplit(": ", 1)[1]) for part in done.stdout.strip().split("  ")[1:]]
    expected = (model.encode_images([picture]) @ model.encode_texts(CAPTIONS[:3]).T)[0]
    assert cosines == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.slow
def test_float16_halves_the_files(checkpoint, exported, model, tmp_path):
    done = export_checkpoint(checkpoint, "onnx", tmp_path / "half", dtype="float16")
    assert 1e-6 < done.difference < 2e-2 and furthest(done.output, model) < 2e-2
    assert (done.output / "text.onnx").stat().st_size < 0.6 * (exported.output / "text.onnx").stat().st_size
    assert all(features.dtype == torch.float32 for features in encode(done.output, model))


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.slow
def test_int8_dynamic_through_the_command_with_recall_before_and_after(
    checkpoint, model, store, tmp_path, capsys, monkeypatch
):
    words = ["export", str(checkpoint), "--to", "onnx", "--dtype", "int8", "--verify", str(store), "--output"]
    monkeypatch.setattr(sys, "argv", ["cnclip-ft", *words, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().out
    assert caught.value.code in (0, None) and "opset 18" in said
    assert "points of mean recall lost: text→image " in said and "image→text" in said and "all" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("source ", "export "))] == [
        "source",
        "export",
    ] * 1
    assert all("MatMulInteger" in operators(tmp_path / "out" / f"{side}.onnx") for side in ("image", "text"))
    assert 1e-5 < furthest(tmp_path / "out", model) < 1e-1
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith("tmp")]


def test_int8_with_ranges_of_a_split(exported, graphs, checkpoint, model, store, tmp_path, monkeypatch):
    # The float32 graphs it is made from are those of `exported`: writing them again would double the time.
    monkeypatch.setattr(writer, "write_graph", lambda *a: shutil.copy(graphs / a[-1].name, a[-1]))
    done = export_checkpoint(checkpoint, "onnx", tmp_path / "out", dtype="int8", calibrate=store, verify=store)
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(done.output / "image.onnx") & operators(
        done.output / "text.onnx"
    )
    assert json.loads((done.output / "description.json").read_text())["quantisation"] == "static"
    assert 1e-5 < furthest(done.output, model) < 1e-1
    before, after = done.recall
    assert before.text_to_image.queries == after.text_to_image.queries > 0
    assert points_lost(before, before) == "text→image +0.00, image→text +0.00, all +0.00"


def session_on(path: Path, values: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: values.numpy()})[0])


@pytest.mark.parametrize(
    "image",
    [
        {"kind": "resnet", "layers": [1, 1], "width": 8, "heads": 4, "image_size": 32},
        "tests.models.tower_fixture:plain",
        "tests.models.tower_fixture:uint8",
    ],
)
def test_other_image_towers(image, tmp_path):
    model = small({"image": image, "text": TEXT, "projection": 16})
    writer.write_graph(ImageEncoder(model).eval(), "image", model, tmp_path / "image.onnx")
    for count in (1, 5):
        values = pixels(model.image_size, count)
        with torch.inference_mode():
            expected = model.image_features(values)
        torch.testing.assert_close(session_on(tmp_path / "image.onnx", values), expected, atol=1e-6, rtol=0)


def test_mean_pooled_texts(tmp_path):
    model = small(SPEC | {"pooling": "mean"})
    writer.write_graph(TextEncoder(model).eval(), "text", model, tmp_path / "text.onnx")
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(CAPTIONS))
    with torch.inference_mode():
        expected = model.text_features(ids, mask)
    torch.testing.assert_close(session_on(tmp_path / "text.onnx", ids), expected, atol=1e-6, rtol=0)


def test_a_tower_torch_cannot_export_is_one_line(tmp_path):
    save_checkpoint(
        small({"image": "tests.models.tower_fixture:data_dependent", "text": TEXT}), tmp_path / "a", info={}
    )
    with pytest.raises(UserError, match="torch cannot export the image tower to ONNX: ") as caught:
        export_checkpoint(tmp_path / "a", "onnx", tmp_path / "out", trust_import=True)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["a"]


def test_weights_beside_the_graph_where_a_protobuf_would_end(model, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_files, "ONE_FILE", 1000)
    monkeypatch.setattr(quantising, "ONE_FILE", 1000)
    (tmp_path / "float").mkdir()
    (tmp_path / "int8").mkdir()
    writer.write_graph(TextEncoder(model).eval(), "text", model, tmp_path / "float" / "text.onnx")
    quantise(tmp_path / "float" / "text.onnx", tmp_path / "int8" / "text.onnx", model, None)
    ids, mask = model.tokenizer.pad(model.tokenizer.encode(CAPTIONS))
    for kind, limit in (("float", 1e-6), ("int8", 1e-1)):
        folder = shutil.move(tmp_path / kind, tmp_path / f"{kind} moved")  # as an export is put in place
        assert (folder / "text.onnx.data").stat().st_size > (folder / "text.onnx").stat().st_size
        with torch.inference_mode():
            expected = model.text_features(ids, mask)
        torch.testing.assert_close(session_on(folder / "text.onnx", ids), expected, atol=limit, rtol=0)


def test_an_export_that_differs_is_not_kept(exported, tmp_path, monkeypatch):
    save_checkpoint(small(SPEC, seed=2), tmp_path / "b", info={})
    monkeypatch.setattr(writer, "write", lambda model, target, order: shutil.copytree(exported.output, target))
    with pytest.raises(UserError, match=r"differ from the source by .* \(limit 0.0001\); it was not kept"):
        export_checkpoint(tmp_path / "b", "onnx", tmp_path / "out")
    assert os.listdir(tmp_path) == ["b"]


def test_refused_before_anything_is_written(checkpoint, store, tmp_path, monkeypatch):
    for options, message in (
        ({"dtype": "bfloat16"}, "--to onnx has float32, float16, int8"),
        ({"calibrate": store}, "--dtype int8 only"),
        ({"verify": tmp_path / "nowhere"}, "nowhere"),
    ):
        with pytest.raises(RequestError, match=message):
            export_checkpoint(checkpoint, "onnx", tmp_path / "out", **options)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RequestError, match=r"--to onnx needs onnxscript .*pip install 'cnclip-ft\[onnx\]'"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_on_request_only(exported, checkpoint, tmp_path):
    shutil.copytree(exported.output, tmp_path / "out")
    with pytest.raises(RequestError, match="is there already"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "out")
    export_checkpoint(checkpoint, "huggingface", tmp_path / "out", overwrite=True)
    assert "image.onnx" not in os.listdir(tmp_path / "out")


def test_recall_is_compared_for_every_format(checkpoint, store, tmp_path):
    for to in ("huggingface", "cn_clip"):
        before, after = export_checkpoint(checkpoint, to, tmp_path / to, verify=store).recall
        assert points_lost(before, after) == "text→image +0.00, image→text +0.00, all +0.00"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"])
def test_published_sizes_at_full_width(name, tmp_path):
    """Widths, heads, patches and image sizes as published, one layer deep (RN50 whole)."""
    from dataclasses import asdict

    from cnclip_ft.models.families.chinese_clip.catalog import ARCHITECTURES

    entry = ARCHITECTURES[name]
    image, text = asdict(entry.image), asdict(entry.text)
    image = {key: value for key, value in image.items() if value is not None}
    text = {key: text[key] for key in ("hidden", "heads", "dropout")} | {"layers": 1}
    if image["kind"] == "vit":
        image["layers"] = 1
    else:
        image["layers"] = list(image["layers"])
    model = build_start({"image": image, "text": text, "projection": entry.projection})[0].eval()
    save_checkpoint(model, tmp_path / "a", info={})
    done = export_checkpoint(tmp_path / "a", "onnx", tmp_path / "out")
    assert done.difference < 1e-5
