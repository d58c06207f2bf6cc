"""The text tower made quick for one short question at a time on the CPU.

A question of a dozen tokens is little work for the weights it has to fetch from memory: RoBERTa-base reads 340 MB for
it. Three things help, and `benchmarks/search.py ways` prints what: half-precision copies of the weights (float32
activations and sums, fbgemm's kernels); the layers called one after another without what transformers does around
them, without padding in the products, query, key and value as one product; and in the last layer only ``[CLS]``, as
nothing else is looked at. The features move by about 1e-4, which is checked before any of it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.models.towers import RobertaTower

ALIKE = 0.9999  # cosine of a text's two features below which none of it is used
_LARGEST = 65504.0  # of half precision
_SAMPLES = [
    "狗",
    "一只在雪地里奔跑的狗",
    "two red stars on a wooden floor, and a small blue umbrella",
    "2024年的Ａ４纸",
]


def quicken(model: DualEncoder) -> float | None:
    """Make the text tower quick where that is possible and harmless: a RoBERTa tower as a whole, of others the products.

    Returns:
        The lowest cosine between a sample text's features before and after; None where nothing was changed: another
        device or precision, a processor without the kernels, or a model that suffers.
    """
    if model.device.type != "cpu":
        return None
    tower = model.text_tower
    layers = [module for module in tower.modules() if type(module) is nn.Linear]
    if not layers or any(_unfit(layer.weight) for layer in layers):
        return None
    before = _features(model)
    changed: list[nn.Module] = []
    try:
        if isinstance(tower, RobertaTower) and tower.pooling == "cls" and tower.text_model.config.hidden_act == "gelu":
            tower.forward = _QuickRoberta(tower)
            changed.append(tower)
        else:
            for layer in layers:
                layer.forward = _packed([layer])
                changed.append(layer)
        alike = float((before * _features(model)).sum(1).min())
    except (RuntimeError, AttributeError, NotImplementedError):
        alike = -1.0
    if alike >= ALIKE:
        return alike
    for module in changed:
        del module.forward
    return None


def _unfit(weight: torch.Tensor) -> bool:
    return weight.dtype != torch.float32 or not float(weight.detach().abs().max()) <= _LARGEST


def _features(model: DualEncoder) -> torch.Tensor:
    """Of the samples together, which pads them, and one by one."""
    return torch.cat([model.encode_texts(_SAMPLES), *(model.encode_texts([text]) for text in _SAMPLES)])


def _packed(layers: list[nn.Linear]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Layers of one input as one product with half-precision weights: ``[…, in]`` → ``[…, sum of out]``."""
    # A copy: the packing cuts what is out of its range in the tensor it is given.
    weight = torch.cat([layer.weight.detach() for layer in layers]).clone()
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return partial(_product, packed)


def _product(packed: torch.ScriptObject, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


class _Layer:
    """One transformer layer (post-norm, as BERT): products packed, norms as they are."""

    def __init__(self, layer: nn.Module) -> None:
        own = layer.attention.self
        self.attend = _packed([own.query, own.key, own.value])
        self.out, self.first = _packed([layer.attention.output.dense]), layer.attention.output.LayerNorm
        self.up, self.down = _packed([layer.intermediate.dense]), _packed([layer.output.dense])
        self.second = layer.output.LayerNorm

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = self.first(self.out(attended) + x)
        return self.second(self.down(F.gelu(self.up(x))) + x)


class _QuickRoberta:
    """Stands for `RobertaTower.forward` with pooling by ``[CLS]``, in evaluation."""

    def __init__(self, tower: RobertaTower) -> None:
        self.embeddings, self.heads = tower.text_model.embeddings, tower.text_model.config.num_attention_heads
        self.layers = [_Layer(layer) for layer in tower.text_model.encoder.layer]
        self.project = _packed([tower.text_projection])

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        real = attention_mask.bool()
        count, length = real.shape
        padded = None if bool(real.all()) else real
        seen = None if padded is None else real[:, None, None]  # by every head and every token
        x = self.embeddings(input_ids=input_ids)[real]  # [tokens, width]: padding is not multiplied
        for layer in self.layers[:-1]:
            query, key, value = self._split(layer.attend(x), padded, count, length)
            attended = F.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2)
            attended = attended.flatten(2)[real] if padded is not None else attended.reshape(x.shape)
            x = layer.after_attention(x, attended)
        layer = self.layers[-1]
        query, key, value = self._split(layer.attend(x), padded, count, length)
        attended = F.scaled_dot_product_attention(query[:, :, :1], key, value, seen)
        starts = real.sum(1).cumsum(0) - real.sum(1)  # where each text's [CLS] lies among the tokens
        return self.project(layer.after_attention(x[starts], attended.flatten(1)))

    def _split(
        self, together: torch.Tensor, padded: torch.Tensor | None, count: int, length: int
    ) -> tuple[torch.Tensor, ...]:
        """``[tokens, 3 · width]`` → query, key, value, each ``[count, heads, length, width / heads]``."""
        if padded is not None:
            spread = together.new_zeros(count, length, together.shape[1])
            spread[padded] = together
            together = spread
        return together.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
