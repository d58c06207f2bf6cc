"""The text tower made quick for one short question at a time on the CPU.

A question of a dozen tokens is too little work for the weights it has to fetch from memory: RoBERTa-base reads 340 MB
and computes next to nothing with them. With half-precision copies of the weights (float32 activations and sums,
fbgemm's kernels) a question takes a third of the time; `benchmarks/search.py ways` prints both. The features move by
about 1e-4, which is checked before the copies are used.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder

ALIKE = 0.9999  # cosine of a text's two features below which the copies are not used
_LARGEST = 65504.0  # of half precision
_SAMPLES = [
    "狗",
    "一只在雪地里奔跑的狗",
    "two red stars on a wooden floor, and a small blue umbrella",
    "2024年的Ａ４纸",
]


def quicken(model: DualEncoder) -> float | None:
    """Give the text tower's linear layers half-precision weights where that is possible and harmless.

    Returns:
        The lowest cosine between a sample text's features before and after; None where nothing was changed: another
        device or precision, a processor without the kernels, or a model that suffers.
    """
    if model.device.type != "cpu":
        return None
    before = model.encode_texts(_SAMPLES)
    layers = [m for m in model.text_tower.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
    if any(float(layer.weight.detach().abs().max()) > _LARGEST for layer in layers):
        return None
    try:
        for layer in layers:
            # A clone: the packing cuts what is out of its range in the tensor it is given.
            packed = torch.ops.quantized.linear_prepack_fp16(layer.weight.detach().clone(), layer.bias)
            layer.forward = partial(_linear, packed)
        after = model.encode_texts(_SAMPLES)
        alike = float((before * after).sum(1).min())
    except (RuntimeError, AttributeError, NotImplementedError):
        alike = -1.0
    if layers and alike >= ALIKE:
        return alike
    for layer in layers:
        layer.__dict__.pop("forward", None)
    return None


def _linear(packed: torch.ScriptObject, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)
