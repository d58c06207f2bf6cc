"""The layout in which transformers.js and optimum look for a model, beside ours in one folder.

``onnx/model.onnx`` takes ids, mask and normalised pixels and gives logits and unit features; ``onnx/text_model.onnx`` and
``onnx/vision_model.onnx`` are one tower each, and give features as they are before they are made unit, as the classes of
transformers do. ``config.json`` and ``preprocessor_config.json`` lie beside the tokenizer. All are cut from the graphs of our own
encoders: the same nodes, the same weights, in 8 bits too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnclip_ft.export.graph import BETWEEN, INPUTS, OUTPUT
from cnclip_ft.export.graph_files import IR_VERSION, OPSET, extract, read_graph, save_graph
from cnclip_ft.export.huggingface import written_picture
from cnclip_ft.export.onnx_encoder import open_session
from cnclip_ft.models.contract import Tokenizer
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.registry import family_of

FOLDER = "onnx"
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # as transformers.js asks for them by dtype
FILES = rf"{FOLDER}/(text_|vision_)?model({'|'.join(filter(None, SUFFIXES.values()))})?\.onnx(_data)?|(preprocessor_)?config\.json"
Pair = tuple[torch.Tensor, torch.Tensor]  # of image and text features, unit, ``[n, dim]``


def fits(model: DualEncoder) -> bool:
    """Whether transformers.js has a class for these towers."""
    web = family_of(model.text_tower).web
    known = web is not None and _configuration(model).get("model_type") == web.model_type
    return known and "image_processor_type" in _processor(model)


def _configuration(model: DualEncoder) -> dict[str, Any]:
    return family_of(model.text_tower).transformers_files(model)["config.json"]


def _processor(model: DualEncoder) -> dict[str, Any]:
    return family_of(model.text_tower).transformers_files(model).get("preprocessor_config.json", {})


def write(model: DualEncoder, whole: dict[str, Path], target: Path, dtype: str) -> None:
    """Write the layout into `target`; nothing where no class is known.

    Args:
        whole: side → graph with all outputs of `graph.ImageEncoder` and `TextEncoder`.
    """
    web = family_of(model.text_tower).web
    if web is None or not fits(model):
        return
    place, suffix, config = target / FOLDER, SUFFIXES[dtype], _configuration(model)
    place.mkdir()
    padded = model.tokenizer.padding == "max_length"  # their padding is attended to: they have no mask
    inputs = {"text": [INPUTS["text"], *([] if padded else ["attention_mask"])], "image": ["pixel_values"]}
    graphs = {
        "text_model": _alone(whole["text"], inputs["text"], BETWEEN["text"][0], web.text_output),
        "vision_model": _alone(whole["image"], inputs["image"], BETWEEN["image"][0], web.image_output),
        "model": _joined(model, whole, inputs),
    }
    apart = [
        f"{name}{suffix}.onnx"
        for name, graph in graphs.items()
        if save_graph(graph, place / f"{name}{suffix}.onnx", beside="_data")
    ]
    if apart:
        config["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(apart, True)}
    processor = _processor(model)
    if web.processor_of_2022:
        processor["feature_extractor_type"] = (
            processor.pop("image_processor_type").replace("Image", "Feature").replace("Processor", "Extractor")
        )
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def read_features(folder: Path, pixels: torch.Tensor, texts: list[str], tokenizer: Tokenizer) -> list[Pair]:
    """Unit features as the graph of both towers gives them, and as those of one tower do; nothing where the layout is not there."""
    found = sorted((folder / FOLDER).glob("*.onnx"))
    if not found:
        return []
    sessions = {path.stem.partition("model")[0]: open_session(path) for path in found}
    ids, mask = tokenizer.pad(tokenizer.encode(texts))
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": written_picture(folder, pixels).for_transformers(pixels)["pixel_values"],
    }

    def run(name: str) -> dict[str, torch.Tensor]:
        session = sessions[name]
        names = [value.name for value in session.get_outputs()]
        feed = {value.name: values[value.name].numpy() for value in session.get_inputs()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))

    both, words, pictures = run(""), run("text_"), run("vision_")
    alone = [torch.nn.functional.normalize(next(iter(one.values())), dim=1) for one in (pictures, words)]
    return [(both["image_embeds"], both["text_embeds"]), (alone[0], alone[1])]


def _alone(path: Path, inputs: list[str], output: str, name: str) -> Any:
    model = extract(read_graph(path), inputs, [output])
    model.graph.outputs[0].name = name
    return model


def _joined(model: DualEncoder, whole: dict[str, Path], inputs: dict[str, list[str]]) -> Any:
    """Both towers and the logits as one graph."""
    import onnx_ir

    sides = {side: extract(read_graph(path), inputs[side], [OUTPUT]) for side, path in whole.items()}
    nodes: list[Any] = []
    initialisers: list[Any] = []
    for side, part in sides.items():
        _rename(part.graph, side)
        nodes += (found := list(part.graph))
        part.graph.remove(found)
        initialisers += (weights := list(part.graph.initializers.values()))
        for weight in weights:
            part.graph.initializers.pop(weight.name)
    text, image = (sides[side].graph.outputs[0] for side in ("text", "image"))

    def number(name: str, value: float) -> Any:
        tensor = onnx_ir.tensor(np.array(value, dtype=np.float32), name=name)
        made = onnx_ir.Value(
            name=name, const_value=tensor, shape=onnx_ir.Shape(()), type=onnx_ir.TensorType(tensor.dtype)
        )
        initialisers.append(made)
        return made

    def put(kind: str, name: str, *values: Any, **attributes: Any) -> Any:
        node = onnx_ir.node(kind, list(values), attributes=attributes or None, name=f"logits/{name}")
        nodes.append(node)
        node.outputs[0].name = name
        return node.outputs[0]

    columns = put("Transpose", "image_columns", image, perm=[1, 0])
    logits = put(
        "Mul",
        "scaled" if model.logit_bias is not None else "logits_per_text",
        put("MatMul", "cosines", text, columns),
        number("scale", model.logit_scale.exp().item()),
    )
    if model.logit_bias is not None:
        logits = put("Add", "logits_per_text", logits, number("bias", model.logit_bias.item()))
    transposed = put("Transpose", "logits_per_image", logits, perm=[1, 0])
    outputs = [transposed, logits, text, image]
    for value, shape in zip(outputs[:2], (("images", "texts"), ("texts", "images")), strict=True):
        value.shape, value.type = onnx_ir.Shape(shape), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    taken = [value for side in ("text", "image") for value in sides[side].graph.inputs]
    for side in sides.values():
        side.graph.inputs.clear()
        side.graph.outputs.clear()
    graph = onnx_ir.Graph(
        taken,
        outputs,
        nodes=nodes,
        initializers=initialisers,
        opset_imports=sides["text"].opset_imports | {"": OPSET},
        name="model",
    )
    functions = [function for part in sides.values() for function in part.functions.values()]
    return onnx_ir.Model(graph, ir_version=IR_VERSION, functions=functions)


def _rename(graph: Any, side: str) -> None:
    """Names of its own for everything inside; the open batch of pictures is another than that of texts."""
    import onnx_ir

    inputs, output = list(graph.inputs), graph.outputs[0]
    inner = [value for node in graph for value in node.outputs if value is not output]
    for value in [*graph.initializers.values(), *inner]:
        if value.name:
            value.name = f"{side}/{value.name}"
    for value in inner:
        value.shape = None  # inferred anew
    for node in graph:
        node.name = f"{side}/{node.name}"
    output.name = BETWEEN[side][0]
    for value in (*inputs, output):
        if value.shape is not None:
            named = [
                re.sub("^batch$", f"{side}s", str(size.value)) if not isinstance(size, int) else size
                for size in value.shape
            ]
            value.shape = onnx_ir.Shape(named)
