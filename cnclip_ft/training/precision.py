"""Which number format a run computes in, and why."""

from __future__ import annotations

import torch

from data_tools.errors import RequestError


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(``fp32`` | ``bf16`` | ``fp16``, reason). Weights, optimizer and logits stay in fp32 in every case.

    Raises:
        RequestError: a format was asked for that the device does not compute in.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not has_bf16:
            raise RequestError(f"precision: bf16, but {torch.cuda.get_device_name(device)} has none; use auto or fp16")
        if wanted != "auto":
            return wanted, "asked for"
        if has_bf16:
            return "bf16", f"{torch.cuda.get_device_name(device)} has bf16: the range of fp32, no loss scaling"
        return "fp16", f"{torch.cuda.get_device_name(device)} has no bf16; fp16 with loss scaling"
    if wanted == "fp16":
        raise RequestError(f"precision: fp16 needs a CUDA device, this run is on {device.type}; use auto, fp32 or bf16")
    if wanted != "auto":
        return wanted, "asked for"
    return "fp32", f"{device.type}: mixed precision brings nothing sure here"
