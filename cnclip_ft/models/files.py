"""Weights files by content, and published names → files. Nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cnclip_ft.models.catalog import ARCHITECTURES
from data_tools.errors import RequestError

Tensors = dict[str, torch.Tensor]
OWNERS = {"huggingface": "OFA-Sys", "modelscope": "AI-ModelScope"}


def read_tensors(path: Path) -> Tensors:
    """The state dict of a ``.safetensors``, ``.bin`` or ``.pt`` file, on the CPU.

    Raises:
        RequestError: it is not there, torn, of another kind, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
        if path.suffix == ".safetensors" or (len(head) > 8 and head[8:9] == b"{"):
            return load_file(path)
        if not head.startswith((b"PK", b"\x80")):
            raise RequestError(f"{path}: neither a safetensors nor a torch file (it begins with {head[:8]!r})")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        said = str(error).splitlines()[0]
        raise RequestError(f"{path}: refused, it holds more than weights and was not executed ({said[:160]})") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise RequestError(f"{path}: the file is torn or of another kind ({str(error).splitlines()[0][:160]})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise RequestError(f"{path}: no state dict in it (a {type(content).__name__})")
    return content


def find(name: str, source: str = "huggingface") -> Path:
    """A path as it is, or the file of a published name: searched locally first, then downloaded.

    Searched: the working folder, ``$CNCLIP_FT_MODELS`` and ``~/.cache/cnclip_ft``, for the official file or a folder
    of the hub's name; then the hub's own cache and the hub.

    Raises:
        RequestError: naming the file, the places searched and where to get it.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    architecture = ARCHITECTURES.get(name)
    if architecture is None or architecture.hub is None:
        published = ", ".join(known for known, a in ARCHITECTURES.items() if a.hub)
        raise RequestError(f"{name}: neither a checkpoint that is there nor a published name ({published})")
    places = [Path.cwd(), Path("~/.cache/cnclip_ft").expanduser()]
    if os.environ.get("CNCLIP_FT_MODELS"):
        places.insert(0, Path(os.environ["CNCLIP_FT_MODELS"]).expanduser())
    for place in places:
        for found in (place / architecture.file, place / architecture.hub):
            if found.exists():
                return found
    repository = f"{OWNERS[source]}/{architecture.hub}"
    try:
        return _download(repository, source)
    except Exception as error:  # noqa: BLE001 - hub clients raise many kinds; each means: not here
        raise RequestError(
            f"{name}: {architecture.file} is not in {', '.join(map(str, places))}, and {repository} could not be fetched from "
            f"{source} ({type(error).__name__}). Put {architecture.file} or the folder {architecture.hub} into one of these "
            "places (or set CNCLIP_FT_MODELS), or name its path."
        ) from None


def _download(repository: str, source: str) -> Path:
    wanted = ["*.json", "vocab.txt", "*.safetensors", "pytorch_model.bin"]
    if source == "modelscope":
        try:
            from modelscope import snapshot_download
        except ImportError:
            raise RequestError("source: modelscope needs the package modelscope (pip install cnclip-ft[modelscope])") from None
        return Path(snapshot_download(repository, allow_patterns=wanted))
    from huggingface_hub import snapshot_download

    # The client resumes torn downloads and compares the hub's checksums.
    return Path(snapshot_download(repository, allow_patterns=wanted))
