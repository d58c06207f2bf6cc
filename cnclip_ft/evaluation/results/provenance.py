"""Everything a score depends on, for the JSON beside it: model, transform, precision, versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_tools.errors import RequestError

if TYPE_CHECKING:
    from cnclip_ft.models.dual_encoder import DualEncoder

FORMAT = 1
_PACKAGES = ("cnclip-ft", "torch", "transformers", "tokenizers", "pillow", "numpy", "lmdb", "safetensors")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise RequestError(f"dtype is {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def default_workers(device: torch.device) -> int:
    """Decoding processes: none on the CPU, where they would take the towers' own cores."""
    import os

    return 0 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    # With its build (+cpu, +cu130), which the package's own record may leave out: other builds round differently.
    return found | {"torch": torch.__version__}


def weights_checksum(model: DualEncoder) -> str:
    """sha256 over names, shapes and bytes of all weights in memory: for models that are not one file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sum(described: Mapping[str, Any]) -> str | None:
    """The checksum that `describe_checkpoint` gave: the file's, or the weights' in memory."""
    return described.get("checksum") or described.get("weights_checksum")


def size_name(model: DualEncoder) -> str | None:
    return model.architecture.name if model.architecture is not None else None


def describe_checkpoint(model: DualEncoder, path: str | Path) -> dict[str, Any]:
    """Where the model came from and how it came to be, as far as its folder says."""
    from cnclip_ft.models.checkpoints import WEIGHTS_SUM, checkpoint_checksum, read_info

    described: dict[str, Any] = {"path": str(path), "architecture": size_name(model)}
    try:
        described["checksum"] = checkpoint_checksum(path)
    except (OSError, RequestError):  # a published name, or a folder with several files of weights
        described["weights_checksum"] = weights_checksum(model)
    try:
        info = read_info(path)
    except RequestError:
        return described
    return described | {
        "history": {key: value for key, value in info.items() if key not in ("format", "model", "recipe", WEIGHTS_SUM)}
    }


def image_size(model: DualEncoder) -> dict[str, Any]:
    """``image_size``, where pictures are taken at another than the checkpoint's own; else nothing."""
    own = model.own_image_size
    return {} if own is None else {"image_size": {"used": model.image_size, "own": own}}


def image_size_notes(settings: Mapping[str, Any] | None) -> list[str]:
    """The same in words, of any record that `image_size` is part of."""
    sides = (settings or {}).get("image_size")
    if not sides:
        return []
    return [f"pictures of {sides['used']} × {sides['used']}, the checkpoint's own are {sides['own']} × {sides['own']}"]


def describe_settings(model: DualEncoder, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Transform, text preparation, precision: what two scores must share to be comparable."""
    return {
        "image_transform": model.image_tower.preprocessing.record(),
        "text": {
            "context_length": model.context_length, "vocabulary": model.tokenizer.vocab_size,
            "preparation": model.tokenizer.preparation,
        },
        "logit_scale": model.logit_scale.exp().item(),
        **image_size(model), **({} if model.narrowed is None else {"dimensions": model.narrowed}),
        "dtype": str(dtype).removeprefix("torch."), "weights_dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "ranking": "1 + non-positives scoring at least as high as the best positive; ties count against the model",
    }  # fmt: skip
