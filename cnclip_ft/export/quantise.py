"""float32 ONNX → int8: ranges of activations taken as they come (dynamic), or settled on a split beforehand (static)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cnclip_ft.export.graph import INPUTS
from cnclip_ft.export.graph_files import ONE_FILE
from cnclip_ft.export.others import quiet, reason
from cnclip_ft.features.sources import Source
from cnclip_ft.models.dual_encoder import DualEncoder
from data_tools.errors import UserError

PICTURES, TEXTS, BATCH = 64, 256, 8


def quantise(source: Path, target: Path, model: DualEncoder, calibration: Source | None) -> None:
    """Write `source` with 8-bit products at `target`.

    Weights get a scale per output channel, and 7 of the 8 bits: on CPUs without VNNI the products of 8-bit numbers
    overflow their 16-bit sums. Only products with weights are 8-bit. Those inside attention and the last
    projection (a Gemm) cost little time and their errors go straight into the features; a convolution is slower in
    8 bits without ranges, and with them cost an EfficientNet 4 points of mean recall.

    Raises:
        UserError: ONNX Runtime's quantiser fails.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    side = source.stem
    target.parent.mkdir(exist_ok=True)
    projections = forget_shapes(source)
    common = {
        "op_types_to_quantize": ["MatMul"], "nodes_to_exclude": projections, "per_channel": True, "reduce_range": True,
        "weight_type": QuantType.QInt8, "extra_options": {"MatMulConstBOnly": True},
        "use_external_data_format": size_of(source) > ONE_FILE,
    }  # fmt: skip
    with quiet():
        try:
            if calibration is None:
                quantize_dynamic(source, target, **common)
            else:
                feeds = Feeds(calibration_batches(side, model, calibration), INPUTS[side])
                quantize_static(
                    source, target, feeds, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8, **common
                )
        except (UserError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - the quantiser's own kinds; a tower by import path may hold anything
            raise UserError(f"ONNX Runtime cannot quantise the {side} tower: {reason(error)}") from None


def forget_shapes(graph: Path) -> list[str]:
    """Leave the shapes between nodes to be inferred anew: the quantiser turns weights round and would trip over the old.

    Returns:
        the names its dynamic kind gives to what was a Gemm.
    """
    import onnx

    content = onnx.load(graph, load_external_data=False)
    content.graph.ClearField("value_info")
    onnx.save(content, graph)
    return [f"{node.name}_MatMul" for node in content.graph.node if node.op_type == "Gemm"]


def size_of(graph: Path) -> int:
    """Bytes of a graph with the weights beside it."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))


def calibration_batches(side: str, model: DualEncoder, split: Source) -> Iterator[np.ndarray]:
    """Input batches of one encoder from pictures or texts spread evenly over the split."""
    if side == "image":
        ids = spread(split.split.image_ids, PICTURES)
        for start in range(0, len(ids), BATCH):
            pictures = [
                model.image_tower.preprocessing.decode(split.read(image_id)) for image_id in ids[start : start + BATCH]
            ]
            yield torch.stack(pictures).numpy()
    else:
        tokens = sorted(model.tokenizer.encode(spread(split.split.texts, TEXTS)), key=len)
        for start in range(0, len(tokens), BATCH):
            yield model.tokenizer.pad(tokens[start : start + BATCH])[0].numpy()


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


class Feeds:
    """What ONNX Runtime's calibration reads: a dictionary at a time, then None."""

    def __init__(self, batches: Iterator[np.ndarray], name: str) -> None:
        self.batches, self.name = batches, name

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}
