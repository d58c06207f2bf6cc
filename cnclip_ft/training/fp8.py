"""`fp8: true`: products of linear layers in 8 bits while a stage trains, by torchao; judged and kept are the plain layers.

Inputs, weights and gradients are scaled tensor by tensor and rounded to 8 bits for the product alone (arXiv 2209.05433); weights,
optimizer and all else stay as they are. A layer's 8-bit form holds the very parameters of the plain one, under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from cnclip_ft.models.dual_encoder import DualEncoder
from cnclip_ft.training.sharding import Sharded, Whole
from data_tools.errors import RequestError

_FIRST_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0
_ALIGNED = 16  # what the kernels want both sides of a weight to be a multiple of


def check_fp8(device: torch.device, precision: str, sharding: Whole) -> None:
    """Refuse 8-bit products where they cannot be.

    Raises:
        RequestError: with the reason.
    """
    lacks = None
    if device.type != "cuda":
        lacks = f"needs a CUDA device, this run is on {device.type}"
    elif (found := torch.cuda.get_device_capability(device)) < _FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        lacks = f"needs a card of compute capability 8.9 or more (Ada, Hopper), and {name} has {found[0]}.{found[1]}"
    elif precision != "bf16":
        lacks = f"goes with bf16, and this run computes in {precision}: precision=bf16"
    elif isinstance(sharding, Sharded):
        lacks = "is not for weights spread over devices (FSDP2); train with whole weights"
    elif find_spec("torchao") is None:
        lacks = "needs torchao: pip install -e '.[fp8]'"
    if lacks is not None:
        raise RequestError(f"fp8: true {lacks}; or leave it out: fp8=false")


def eight_bit(layer: nn.Linear, *, emulate: bool = False) -> nn.Linear:
    """The layer with its products in 8 bits, over the same parameters; `emulate` rounds to 8 bits and multiplies in more: any device."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Inner sides that are no multiple of 16 (tokens of a batch, in the weight's gradient) are filled up.
    made = convert_to_float8_training(layer, config=Float8LinearConfig(pad_inner_dim=True, emulate=emulate))
    assert isinstance(made, nn.Linear)
    return made


class EightBits:
    """Linear layers of the towers' blocks that take 8-bit products, in a model that trains; made by `eight_bit` where it begins."""

    def __init__(self, model: DualEncoder) -> None:
        self._places: list[tuple[nn.Module, str, nn.Linear, nn.Linear]] = []
        for tower in (model.image_tower, model.text_tower):
            for block in tower.blocks()[1:-1]:  # stem and projection stay
                for parent in block.modules():
                    for name, layer in parent.named_children():
                        if type(layer) is nn.Linear and _fits(layer):
                            self._places.append((parent, name, layer, eight_bit(layer)))
        self.enter()

    def __len__(self) -> int:
        return len(self._places)

    def enter(self) -> None:
        for parent, name, _, made in self._places:
            setattr(parent, name, made)

    def leave(self) -> None:
        for parent, name, plain, _ in self._places:
            setattr(parent, name, plain)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Inside, the plain layers are there."""
        self.leave()
        try:
            yield
        finally:
            self.enter()


def _fits(layer: nn.Linear) -> bool:
    return layer.weight.requires_grad and layer.in_features % _ALIGNED == 0 and layer.out_features % _ALIGNED == 0
