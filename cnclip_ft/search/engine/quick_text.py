"""The text tower made quick for one short question at a time on the CPU.

A question of a dozen tokens is little work for the weights it has to fetch from memory: RoBERTa-base reads 340 MB for
it. Half-precision copies of the weights (module `half`) are half of that, and query, key and value are one product
instead of three; the tower itself leaves out padding and what nobody reads (the family's own layers). `benchmarks/search.py
ways` prints what it brings. The features move by about 1e-4, which is checked before any of it is used.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from cnclip_ft.models.contract import TextTower
from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.retrieval import half

ALIKE = 0.9999  # cosine of a text's two features below which none of it is used
_LARGEST = 65504.0  # of half precision
_SAMPLES = [
    "狗",
    "一只在雪地里奔跑的狗",
    "two red stars on a wooden floor, and a small blue umbrella",
    "2024年的Ａ４纸",
]


def use_half_products(model: DualEncoder) -> float | None:
    """Give the text tower's products half-precision weights where that is possible and harmless.

    Returns:
        The lowest cosine between a sample text's features before and after; None where nothing was changed: another
        device or precision, a processor without the kernels, or a model that suffers.
    """
    if model.device.type != "cpu" or not half.available():
        return None
    linear = [module for module in model.text_tower.modules() if type(module) is nn.Linear]
    if not linear or any(_unfit(layer.weight) for layer in linear):
        return None
    before = _features(model)
    changed = _replace(model.text_tower, linear)
    alike = float((before * _features(model)).sum(1).min())
    if alike >= ALIKE:
        return alike
    for module, name in changed:
        delattr(module, name)
    return None


def _replace(tower: TextTower, linear: list[nn.Linear]) -> list[tuple[nn.Module, str]]:
    """Modules and the names of what now stands before their classes' own methods."""
    changed: list[tuple[nn.Module, str]] = []
    for group in tower.linear_groups():
        if all(part in linear for part in group.layers):
            setattr(group.owner, group.method, partial(_together, packed=_pack(group.layers), parts=len(group.layers)))
            changed.append((group.owner, group.method))
            linear = [rest for rest in linear if rest not in group.layers]
    for rest in linear:
        setattr(rest, "forward", partial(half.product, packed=_pack([rest])))  # noqa: B010 - before the class's own method
        changed.append((rest, "forward"))
    return changed


def _pack(layers: list[nn.Linear]) -> torch.ScriptObject:
    """Layers of one input as one product."""
    # `cat` copies, also one tensor: packing cuts what is beyond its range in the tensor it is given.
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return half.pack(weight, None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers]))


def _together(tokens: torch.Tensor, packed: torch.ScriptObject, parts: int) -> tuple[torch.Tensor, ...]:
    return half.product(tokens, packed).chunk(parts, dim=1)


def _unfit(weight: torch.Tensor) -> bool:
    return weight.dtype != torch.float32 or not float(weight.detach().abs().max()) <= _LARGEST


def _features(model: DualEncoder) -> torch.Tensor:
    """Of the samples together, which pads them, and one by one."""
    return torch.cat([model.encode_texts(_SAMPLES), *(model.encode_texts([text]) for text in _SAMPLES)])
