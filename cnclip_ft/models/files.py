"""Files of weights → tensors, recognised by content. Nothing in a file is ever executed.

safetensors, torch files (``weights_only=True``), TorchScript archives (their data alone, the code stays unread) and
folders of shards. A file that needs more than that is refused with the reason.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from data_tools.errors import RequestError

Tensors = dict[str, torch.Tensor]
_AT_ONCE = 128 << 20  # bytes of a safetensors file mapped at a time
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Content:
    """A file's tensors, and the plain values that stand beside them (epoch, step, name, …)."""

    tensors: Tensors
    extras: dict[str, Any] = field(default_factory=dict)


def read_file(path: str | Path, dtype: torch.dtype = torch.float32) -> Content:
    """The tensors of one file on the CPU, floating point ones as `dtype`, none of them mapped to the file any more.

    Raises:
        RequestError: it is not there, torn, of another kind, or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            return Content(_read_safetensors(path, dtype))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                prefix = next(
                    (name[: -len("constants.pkl")] for name in names if name.endswith("/constants.pkl")), None
                )
                if prefix is not None:
                    return _converted(_read_torchscript(archive, prefix), dtype)
                if not any(name.endswith("/data.pkl") for name in names):
                    raise RequestError(f"{path}: a zip archive without weights; unpack it and name the file inside")
            # Mapped: the optimizer's part of a training checkpoint, twice the weights, is never read.
            content = _torch_load(path, mmap=True)
        elif head[:1] == b"\x80":
            content = _torch_load(path, mmap=False)
        else:
            raise RequestError(f"{path}: {_what_else(head)}")
        return _converted(content, dtype)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except RequestError as error:
        raise error if str(error).startswith(str(path)) else RequestError(f"{path}: {error}") from None
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path}: refused, reading it would run code of the file ({_reason(error)}). Nothing was executed; "
            "ask its author for the plain state dict or for safetensors"
        ) from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 - there is no end of what readers raise on damaged bytes
        raise RequestError(f"{path}: the file is torn or damaged ({_reason(error)}); fetch it again") from None


def read_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Content:
    """Weights of a transformers folder: one file, or shards listed in an index; safetensors before ``.bin``.

    Raises:
        RequestError: no weights in it, or unreadable ones.
    """
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return read_file(folder / name, dtype)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            tensors: Tensors = {}
            for shard in shards:
                if Path(shard).name != shard:
                    raise RequestError(f"{index}: names the file {shard!r} outside of its folder")
                tensors |= read_file(folder / shard, dtype).tensors
            return Content(tensors)
    raise RequestError(f"{folder}: no weights in it; expected {' or '.join(FOLDER_FILES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RequestError: not there, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({_reason(error)})") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def _torch_load(path: Path, *, mmap: bool) -> Any:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    with open(path, "rb") as file:  # torch would go by the name, which is wrong
        return torch.load(file, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()] or [""]
    telling = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
    return (telling or type(error).__name__)[:200]


def _what_else(head: bytes) -> str:
    if not head:
        return "the file is empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; run `git lfs pull` where it came from"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not weights; the download went wrong"
    if head.startswith(b"PK"):
        return "a torn zip archive (its end is missing); fetch it again"
    return f"neither a safetensors nor a torch file (it begins with {head[:8]!r})"


def _read_safetensors(path: Path, dtype: torch.dtype) -> Tensors:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        sizes = {name: math.prod(file.get_slice(name).get_shape()) * 4 for name in names}
    tensors: Tensors = {}
    while names:
        # Opened once per part: what is mapped counts as memory until the mapping goes, so the peak stays near the weights' size.
        taken = 0
        with safe_open(path, "pt") as file:
            while names and (taken == 0 or taken + sizes[names[-1]] <= _AT_ONCE):
                name = names.pop()
                taken += sizes[name]
                tensors[name] = _own(file.get_tensor(name), dtype)
    return tensors


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _converted(content: Any, dtype: torch.dtype) -> Content:
    extras: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        extras = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer")}
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise RequestError(f"no state dict in it (a {type(content).__name__})")
    other = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise RequestError(
            f"no state dict in it: {', '.join(other[:3])} {'is' if len(other) == 1 else 'are'} not tensors"
        )
    names = list(content)
    return Content({str(name): _own(content.pop(name), dtype) for name in names}, extras)


# ---- TorchScript archives -------------------------------------------------------------------------------------------


class _Module:
    """Stands for any class of the archive's own code: holds attributes, does nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _ScriptUnpickler(pickle.Unpickler):
    """Reads the data of a TorchScript archive; every class of its code becomes a `_Module`."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(archive.open(f"{prefix}data.pkl"))
        self.archive, self.prefix, self.storages = archive, prefix, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch.jit._pickle" and (name.startswith("build_") or name == "restore_type_tag"):
            return lambda value, *_: value
        known = {("torch._utils", "_rebuild_tensor_v2"): self._tensor, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, kind, key, _, count = pid
        if key not in self.storages:
            dtype = {"Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32,
                     "Long": torch.int64, "Half": torch.half, "BFloat16": torch.bfloat16, "Float": torch.float,
                     "Double": torch.double}[kind.removesuffix("Storage")]  # fmt: skip
            data = bytearray(self.archive.read(f"{self.prefix}data/{key}"))
            self.storages[key] = (
                torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]

    @staticmethod
    def _tensor(
        storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> torch.Tensor:
        return storage.as_strided(size, stride, offset)


def _read_torchscript(archive: zipfile.ZipFile, prefix: str) -> Tensors:
    tensors: Tensors = {}

    def walk(module: _Module, path: str) -> None:
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tensors[path + name] = value
            elif isinstance(value, _Module):
                walk(value, f"{path}{name}.")

    root = _ScriptUnpickler(archive, prefix).load()
    if not isinstance(root, _Module):
        raise RequestError("a TorchScript archive that holds no module")
    walk(root, "")
    return tensors
