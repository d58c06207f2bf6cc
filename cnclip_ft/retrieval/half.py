"""Products with half-precision weights on the CPU (fbgemm): float32 in and out, float32 sums, half the memory to read."""

from __future__ import annotations

import functools

import torch


@functools.cache
def available() -> bool:
    """Whether this processor and this torch have the kernels. What fails where they are there is an error, and raised."""
    try:
        product(torch.zeros(1, 8), pack(torch.zeros(8, 8)))
    except (RuntimeError, AttributeError):
        return False
    return True


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.ScriptObject:
    """Float32 ``[out, in]``, as the kernels want it; what is beyond half precision is cut in the tensor that is given."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def product(x: torch.Tensor, packed: torch.ScriptObject) -> torch.Tensor:
    """``[…, in]`` → ``[…, out]``."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)
