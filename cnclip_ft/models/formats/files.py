"""Files of weights ↔ tensors, recognised by content. Nothing in a file is ever executed.

safetensors, torch files and TorchScript archives (`torch_files`), and folders of shards. A file that is something else, or
takes more time or memory than its size warrants, is refused with the reason.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cnclip_ft.models.formats.state_dict import find_state_dict, own_names
from cnclip_ft.models.formats.torch_files import TorchFile
from data_tools.atomic import usual_rights
from data_tools.errors import RequestError
from data_tools.regular import regular

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
_LONGEST_JSON = 16 << 20  # bytes
_PICKLES = (b"\x80", b"(", b"]", b"}")
_KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_HANDS = min(4, os.cpu_count() or 1)  # threads that read one file
_SHARE = 1 << 20  # bytes that are worth a thread's while
_PIECE = 64 << 20  # bytes after which a reader looks whether it is still wanted
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Content:
    """A file's tensors, the plain values that stand beside them (epoch, step, name, …), what was adapted, in words, names
    of tensors that were left, and the names in the file of those whose name was adapted."""

    tensors: Tensors
    extras: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    file_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Hands:
    """Who reads a file: so many threads, until it is not wanted any more."""

    count: int
    unwanted: Event = field(default_factory=Event)


@dataclass(frozen=True)
class _Begun:
    path: Path
    dtype: torch.dtype
    content: Future[Content]


_ahead: ContextVar[_Begun | None] = ContextVar("_ahead", default=None)


def read_file(path: str | Path, dtype: torch.dtype = torch.float32) -> Content:
    """The tensors of one file on the CPU, floating point ones as `dtype`, none of them mapped to the file any more.

    Raises:
        RequestError: it is not there, torn, of another kind, a bomb, or its weights are more than tensors.
    """
    begun = _ahead.get()
    if begun is not None and (begun.path, begun.dtype) == (Path(path), dtype):
        _ahead.set(None)  # once: who reads it again gets tensors of their own
        return begun.content.result()
    return _read_file(Path(path), dtype, _Hands(_HANDS))


def _read_file(path: Path, dtype: torch.dtype, hands: _Hands) -> Content:
    def tensors_of(torch_file: TorchFile) -> Content:
        stubs, extras, notes = find_state_dict(torch_file.content)
        return Content(torch_file.tensors(stubs, dtype), extras, notes)

    return _opened(path, lambda head: Content(_read_safetensors(path, head, dtype, hands)), tensors_of)


@contextmanager
def read_ahead(folder: Path, dtype: torch.dtype) -> Iterator[None]:
    """Begin with the weights of a folder while what is to take them is imported, which takes a second or two; `read_file` in here
    then waits for them. Torch files are left: their reader is Python, and two of it at once are no faster.

    What is wrong with the file is said where it is asked for. Nothing is read on behind the end.
    """
    path = folder / FOLDER_FILES[0]
    if not path.is_file():
        yield
        return
    hands = _Hands(max(1, _HANDS - 1))  # one imports
    with ThreadPoolExecutor(1) as reader:
        try:
            begun = _Begun(path, dtype, reader.submit(_read_file, path, dtype, hands))
        except RuntimeError:  # no thread is to be had: the machine's limit, or Python is about to end
            begun = None
        token = _ahead.set(begun)
        try:
            yield
        finally:
            _ahead.reset(token)
            hands.unwanted.set()


def read_names(path: Path) -> list[str]:
    """The names of a file's tensors, without what wrappers put before them; none of their numbers is read.

    Raises:
        RequestError: as `read_weights`.
    """

    def names_of(head: bytes) -> list[str]:
        with safe_open(path, "pt") as file:
            return list(file.keys())

    names = _opened(path, names_of, lambda torch_file: list(find_state_dict(torch_file.content)[0]))
    return list(own_names(names)[0].values())


def _opened(path: Path, safetensors: Callable[[bytes], T], torch_file: Callable[[TorchFile], T]) -> T:
    """What one of the two makes of the file, which is told by its beginning."""
    try:
        size = regular(path)
        with open(path, "rb") as file:
            head = file.read(64)
            if head[8:9] == b"{":
                return safetensors(head)
            if head[:2] != b"PK" and head[:1] not in _PICKLES:
                raise RequestError(f"{path}: {_what_else(head)}")
            return torch_file(TorchFile(file, size))
    except RequestError as error:
        raise error if str(error).startswith(str(path)) else RequestError(f"{path}: {error}") from None
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path}: refused, reading it would run code of the file or take for ever ({_reason(error)}). Nothing was "
            "executed; ask its author for the plain state dict or for safetensors"
        ) from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # noqa: BLE001 - there is no end of what readers raise on damaged bytes
        raise RequestError(f"{path}: the file is torn or damaged ({_reason(error)}); fetch it again") from None


def read_weights(path: Path, dtype: torch.dtype = torch.float32) -> Content:
    """A file or a folder of a stranger's weights, the words that wrappers put before the names taken off.

    Raises:
        RequestError: as `read_file` and `read_folder`; or two models are in it.
    """
    content = read_folder(path, dtype) if path.is_dir() else read_file(path, dtype)
    try:
        own, rest, notes = own_names(content.tensors)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    tensors = {own[name]: tensor for name, tensor in content.tensors.items() if name in own}
    return Content(tensors, content.extras, content.notes + notes, rest, {mine: name for name, mine in own.items()})


def read_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Content:
    """Weights of a transformers folder: one file, or shards listed in an index; safetensors before ``.bin``.

    Raises:
        RequestError: no weights in it, or unreadable ones.
    """
    for name in FOLDER_FILES:
        if os.path.lexists(folder / name):
            return read_file(folder / name, dtype)
        index = folder / f"{name}.index.json"
        if os.path.lexists(index):
            return Content(_read_shards(folder, index, dtype))
    raise RequestError(f"{folder}: no weights in it; expected {' or '.join(FOLDER_FILES)}. {how_to_fetch(folder)}")


def _read_shards(folder: Path, index: Path, dtype: torch.dtype) -> Tensors:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(type(shard) is str for shard in where.values()):
        raise RequestError(f"{index}: weight_map is not a list of tensors' names and files; fetch it again")
    tensors: Tensors = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or "\\" in shard:
            raise RequestError(f"{index}: names the file {shard[:80]!r} outside of its folder")
        if not (folder / shard).exists():
            raise RequestError(f"{index}: names {shard}, which is not there. {how_to_fetch(folder, shard)}")
        found = read_file(folder / shard, dtype).tensors
        twice = tensors.keys() & found.keys()
        if twice:
            raise RequestError(f"{folder / shard}: {min(twice)} stands in another shard too; fetch the shards again")
        tensors |= found
    missing = sorted(where.keys() - tensors.keys())
    if missing:
        raise RequestError(f"{index}: names {missing[0]}, which is in no shard; fetch the shards again")
    return tensors


def how_to_fetch(folder: Path, file: str = "") -> str:
    """The line to type where a folder of the hub is not whole."""
    return f"Fetch it: hf download OWNER/NAME {file}{' ' * bool(file)}--local-dir {folder}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RequestError: not there, or not a JSON object.
    """
    regular(path, _LONGEST_JSON)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise RequestError(f"{path} cannot be read (its brackets are nested too deeply); fetch it again") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({_reason(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def save_tensors(tensors: Tensors, path: Path) -> None:
    """A safetensors file with the rights the umask gives; safetensors itself leaves it to the owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    usual_rights(path)


def _reason(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "").strip() or type(error).__name__)[:200]


def _what_else(head: bytes) -> str:
    if not head:
        return "the file is empty; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; run `git lfs pull` where it came from"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not weights; the download went wrong"
    return f"neither a safetensors nor a torch file (it begins with {head[:8]!r})"


def _read_safetensors(path: Path, head: bytes, dtype: torch.dtype, hands: _Hands) -> Tensors:
    # The library itself refuses tensors that overlap, leave gaps or lie beyond the file's end.
    length = int.from_bytes(head[:8], "little")
    if length > _LONGEST_JSON:
        raise RequestError(
            f"torn or damaged: a head of {length:,} bytes; tensors' names take at most {_LONGEST_JSON:,}"
        )
    with safe_open(path, "pt") as checked:
        names = list(checked.keys())
    tensors: Tensors = {}
    # Straight into memory of their own: through the library's mapping every page is touched twice, three times the work.
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(hands.count) as others:
        file.seek(8)
        told = json.loads(file.read(length))
        for name in names:
            kind = _KINDS.get(told[name]["dtype"])
            if kind is None:
                with safe_open(path, "pt") as mapped:
                    tensors[name] = _own(mapped.get_tensor(name), dtype)
                continue
            tensor = torch.empty(told[name]["shape"], dtype=kind)
            begins = 8 + length + told[name]["data_offsets"][0]
            _fill(file, begins, tensor.reshape(-1).view(torch.uint8).numpy().data, hands, others)
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def _fill(file: FileIO, begins: int, place: memoryview, hands: _Hands, others: ThreadPoolExecutor) -> None:
    """Bytes of the file from `begins`, by several threads where they are many: what takes the time is fresh memory, page by page."""
    if not hasattr(os, "preadv"):  # Windows: a file has one place it is read at
        file.seek(begins)
        return _fill_part(file, begins, place, hands.unwanted)
    share = max(_SHARE, -(-len(place) // hands.count))
    behind, asked = [], min(share, len(place))
    try:
        while asked < len(place):
            behind.append(others.submit(_fill_part, file, begins + asked, place[asked : asked + share], hands.unwanted))
            asked += share
    except RuntimeError:  # no further thread is to be had: the rest is read here
        _fill_part(file, begins + asked, place[asked:], hands.unwanted)
    _fill_part(file, begins, place[:share], hands.unwanted)
    for part in behind:
        part.result()


def _fill_part(file: FileIO, begins: int, place: memoryview, unwanted: Event) -> None:
    while place:
        if unwanted.is_set():
            raise RequestError("not read to its end: it is not wanted any more")
        piece = place[:_PIECE]
        read = os.preadv(file.fileno(), [piece], begins) if hasattr(os, "preadv") else file.readinto(piece)
        if not read:
            raise RequestError("torn: it ends within its tensors")
        place, begins = place[read:], begins + read


def _own(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
