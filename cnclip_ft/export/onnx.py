"""Both encoders as ONNX files, with tokenizer, a description of the preprocessing and an example that needs no torch."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnclip_ft.export import ground_graph, web_layout
from cnclip_ft.export.graph import BETWEEN, INPUTS, OUTPUT, ImageEncoder, TextEncoder
from cnclip_ft.export.graph_files import OPSET, extract, open_at, read_graph, save_graph
from cnclip_ft.export.onnx_encoder import OnnxEncoder
from cnclip_ft.export.others import exported
from cnclip_ft.export.quantise import quantise
from cnclip_ft.export.settings import ExportSettings
from cnclip_ft.models.checkpoints import TOKENIZER_FILES
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.atomic import sync_file
from data_tools.errors import RequestError
from data_tools.outputs import FolderKind, folder_with

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}  # int8 is made from float32
DESCRIPTION = "description.json"
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")

KIND = FolderKind(
    "folder of ONNX files",
    folder_with(DESCRIPTION, "format", "opset", "image", "text"),
    re.compile(
        rf"(image|text|ground)\.onnx(\.data|_data)?|{re.escape(DESCRIPTION)}|example\.py|{TOKENIZER_FILES}|{web_layout.FILES}"
    ),
)


def check(model: DualEncoder) -> None:
    """Refuse where the extra is missing. Whether torch can export a tower shows when it tries."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RequestError(f"--to onnx needs {package} ({error}): pip install 'cnclip-ft[onnx]'") from None


def write(model: DualEncoder, target: Path, order: ExportSettings) -> None:
    """``image.onnx``, ``text.onnx``, ``ground.onnx`` of a model that has learnt boxes, tokenizer files, ``description.json``, ``example.py``; where other libraries know the class
    of the model, their layout of it beside (`web_layout`)."""
    target.mkdir()
    with tempfile.TemporaryDirectory(dir=target) as name:
        encoders = {"image": ImageEncoder(model).eval(), "text": TextEncoder(model).eval()}
        whole = {side: Path(name, f"{side}.onnx") for side in encoders}
        for side, encoder in encoders.items():
            write_graph(encoder, side, model, whole[side])
            if order.dtype == "int8":
                quantise(whole[side], Path(name, "int8", f"{side}.onnx"), model, order.calibration)
                whole[side] = Path(name, "int8", f"{side}.onnx")
            save_graph(extract(read_graph(whole[side]), [INPUTS[side]], [OUTPUT]), target / f"{side}.onnx")
        web_layout.write(model, whole, target, order.dtype)
    if model.heads is not None:
        ground_graph.write(model, target, _of_boxes(order))
    model.tokenizer.save(target)
    text = json.dumps(describe(model, order), indent=2, ensure_ascii=False) + "\n"
    (target / DESCRIPTION).write_text(text, encoding="utf-8")
    if example_fits(model, target):
        shutil.copyfile(Path(__file__).with_name("onnx_example.py"), target / "example.py")
    for file in target.rglob("*"):
        if file.is_file():
            sync_file(file)


def _of_boxes(order: ExportSettings) -> str:
    """The number format of learnt boxes: those of an int8 export stay in float32, as 8 bits move boxes."""
    return "float32" if order.dtype == "int8" else order.dtype


def example_fits(model: DualEncoder, folder: Path) -> bool:
    """Whether ``example.py`` prepares pictures and texts as this model wants them."""
    usual = SquarePicture(model.image_size).fitting
    whole = model.image_tower.preprocessing.fitting == usual and model.tokenizer.padding == "longest"
    return whole and (folder / "tokenizer.json").is_file()


def write_graph(encoder: nn.Module, side: str, model: DualEncoder, path: Path) -> None:
    """One encoder with all its outputs, its batch (and text length) left open.

    Raises:
        UserError: torch cannot export it; the message says why.
    """
    batch = torch.export.Dim("batch")
    if side == "image":
        example = model.image_tower.example(2)
        shapes = ({0: batch},)
    else:
        longest = model.text_tower.max_length
        tokens = torch.export.Dim("tokens", max=longest)
        example = torch.ones(2, min(7, longest), dtype=torch.int64)
        shapes = ({0: batch, 1: tokens},)
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    made = exported(encoder, (example,), [INPUTS[side]], [OUTPUT, *BETWEEN[side]], shapes, f"the {side} tower")
    open_at(made, BETWEEN[side][1])
    save_graph(made, path, size)


def describe(model: DualEncoder, order: ExportSettings) -> dict:
    """``description.json``: all it takes to use the two files without this package."""
    tower, picture, tokenizer = model.image_tower, model.image_tower.preprocessing, model.tokenizer.describe()
    return {
        "format": 1, "opset": OPSET, "dtype": order.dtype, "source": order.info["exported_from"],
        "quantisation": None if order.dtype != "int8" else "dynamic" if order.calibration is None else "static",
        "dimension": tower.output_dim, "logit_scale": model.logit_scale.exp().item(),
        "image": {
            "file": "image.onnx", "input": INPUTS["image"], "output": OUTPUT, "type": "uint8",
            "shape": ["batch", *picture.shape], "size": picture.size, "colours": "RGB",
        } | picture.outside(),
        "text": {
            "file": "text.onnx", "input": INPUTS["text"], "output": OUTPUT, "type": "int64",
            "shape": ["batch", "tokens"], "context_length": model.context_length, "pad_id": model.tokenizer.pad_id,
            "preparation": f"{model.tokenizer.preparation}; pad to {model.tokenizer.padding}" if tokenizer else
                           "tokenizer.json does it all; pad to the longest of the batch, the mask is made inside the graph",
        } | ({"tokenizer": tokenizer} if tokenizer else {}),
        "output": "float32 [batch, dimension] of unit length: a product of two is their cosine",
    } | (
        {"logit_bias": model.logit_bias.item()} if model.logit_bias is not None else {}
    ) | ({"ground": ground_graph.describe(model, _of_boxes(order))} if model.heads is not None else {})  # fmt: skip


def open_encoder(target: Path) -> OnnxEncoder:
    """What was written, as something `evaluation` can encode with."""
    return OnnxEncoder(target)


def read_features(target: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features ``[ways, n, dim]`` through ONNX Runtime. Of our own files in batches of 1, 2, … with texts of their own lengths:
    all dimensions that were left open are walked; and of other libraries' files as they are called there."""
    encoder = open_encoder(target)
    ids = encoder.tokenizer.encode(texts)
    images = [encoder.image_features(part) for part in _parts(pixels)]
    words = [encoder.text_features(*encoder.tokenizer.pad(part)) for part in _parts(ids)]
    others = web_layout.read_features(target, pixels, texts, encoder.tokenizer)
    ways = [(torch.cat(images), torch.cat(words)), *others]
    return torch.stack([way[0] for way in ways]), torch.stack([way[1] for way in ways])


def _parts(items: Any) -> Iterator[Any]:
    """The first, the next two, the next three, …."""
    start, count = 0, 1
    while start < len(items):
        yield items[start : start + count]
        start, count = start + count, count + 1


def advice(model: DualEncoder, output: Path) -> str:
    """How to try what was written."""
    said = f"ONNX opset {OPSET}; see {output / DESCRIPTION}"
    if not example_fits(model, output):
        return said
    return (
        f"{said}, or try it (onnxruntime, tokenizers, numpy, Pillow): python {output / 'example.py'} PICTURE … TEXT …"
    )
