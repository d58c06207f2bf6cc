"""ONNX graphs as files: read, cut to what lies between names, saved in the versions that runtimes of 2023 read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPSET = 18  # LayerNormalization is one node from 17 on; TensorRT 10 and OpenVINO know all of 18
IR_VERSION = 8  # what runtimes of 2023 read; nothing here needs a newer one
ONE_FILE = 1_800_000_000  # bytes of weights; above, they lie beside the graph: a protobuf ends at 2 GiB


def read_graph(path: Path) -> Any:
    """The ``onnx_ir.Model`` of a file; its weights stay on the disk until they are asked for."""
    import onnx_ir

    return onnx_ir.load(path)


def open_at(model: Any, name: str) -> None:
    """Let a graph be able to begin at its output `name`, a value of its input's shape: whoever asks the input for its size asks
    that value instead, and a copy made for the output alone is the value itself."""
    graph = model.graph
    place = next(place for place, output in enumerate(graph.outputs) if output.name == name)
    value, given = graph.outputs[place], graph.inputs[0]
    copy = value.producer()
    if copy.op_type == "Identity" and copy.inputs[0] not in (*graph.inputs, *graph.outputs):
        (inner,) = copy.inputs
        value.name = f"{name}/copy"
        inner.name, inner.shape, inner.type = name, value.shape, value.type
        graph.outputs[place] = inner
        graph.remove(copy, safe=True)
        value = inner
    before = _before(value)
    for node, at in given.uses():
        if node.op_type == "Shape" and node not in before:
            node.replace_input_with(at, value)
    graph.sort()


def _before(value: Any) -> set[Any]:
    """The nodes that a value is made by."""
    found: set[Any] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [given.producer() for given in node.inputs if given is not None]
    return found


def extract(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """A model of what lies between these values, in this order; what else led to or from them is left out."""
    import onnx_ir

    graph = onnx_ir.convenience.extract(model.graph, inputs, outputs)
    return onnx_ir.Model(graph, ir_version=IR_VERSION, functions=model.functions.values())


def save_graph(model: Any, path: Path, size: int | None = None, *, beside: str = ".data") -> bool:
    """Write `model` at `path`.

    Args:
        size: bytes of its weights, where they are known.
        beside: what is put behind the file's name for weights above `ONE_FILE`.

    Returns:
        Whether weights lie beside.
    """
    import onnx_ir

    if size is None:
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    model.ir_version, apart = IR_VERSION, size > ONE_FILE
    onnx_ir.save(model, path, external_data=f"{path.name}{beside}" if apart else None)
    return apart
