"""Torch's files → tensors: zip archives, TorchScript archives, and the bare pickles before torch 1.6.

`torch.load` is not used: its safe reader hashes and allocates what a file says, and knows no class beside its own. Here a
file's classes become stand-ins that hold nothing and do nothing, so that a model is read while an optimizer with numpy
numbers or a trainer's settings beside it are left where they are. Tensors are read when they are asked for.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

import torch

from data_tools.errors import RequestError
from data_tools.plain_pickle import PlainUnpickler, plain_items

MOST_TENSORS = 200_000
MOST_PICKLED = 64 << 20  # bytes
MOST_RATIO, SLACK = 10, 64 << 20  # of a zip's members unpacked to its size; weights hardly shrink
_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e5m2",
    )
    if hasattr(torch, name)
}
_STORAGES = {
    "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Half": torch.half, "BFloat16": torch.bfloat16, "Float": torch.float, "Double": torch.double, "Untyped": torch.uint8,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
# What trainers keep beside their weights. Everything else a file names is taken for code, and the file is refused.
_HARMLESS_ROOTS = ("argparse", "datetime", "lightning", "lightning_fabric", "omegaconf", "pathlib", "pytorch_lightning")
_HARMLESS = {
    "_codecs": {"encode"}, "copyreg": {"_reconstructor"}, "types": {"SimpleNamespace"},
    "builtins": {"object", "set", "frozenset", "complex", "slice", "range", "bytearray", "list", "dict", "tuple", "int", "long", "float", "str"},
    "numpy": {"dtype", "ndarray", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)), "bool_"},
    "numpy.core.multiarray": {"scalar", "_reconstruct"}, "numpy._core.multiarray": {"scalar", "_reconstruct"},
    "numpy.core.numeric": {"_frombuffer"}, "numpy._core.numeric": {"_frombuffer"},
    "torch": {"device", "Generator"}, "torch.serialization": {"_get_layout"},
}  # fmt: skip


class StandIn:
    """What a class of the file becomes. `state`: what a TorchScript module holds; else nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class Stored:
    """Numbers of a file, not yet read: `count` of them, under a key."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Stub:
    """A tensor of a file, not yet read; its place within `stored` was checked."""

    stored: Stored
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of(self, data: bytearray, dtype: torch.dtype) -> torch.Tensor:
        """The tensor over the bytes of `stored`, as a tensor of its own; floating point ones as `dtype`."""
        numbers = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        seen = numbers.as_strided(self.size, self.stride, self.offset)
        made = seen.to(dtype if seen.is_floating_point() else seen.dtype).contiguous()
        shares = made.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
        return made.clone() if shares and made.numel() != numbers.numel() else made


class TorchFile:
    """An open torch file: `content` is what it holds, with a `Stub` for every tensor.

    Raises:
        RequestError, pickle.UnpicklingError, or whatever damaged bytes raise: it is not one, or beyond the bounds.
    """

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file = file
        self._archive: zipfile.ZipFile | None = None
        self._places: dict[str, int] = {}
        file.seek(0)
        if file.read(2) == b"PK":
            if not zipfile.is_zipfile(file):
                raise RequestError("a torn zip archive (its end is missing); fetch it again")
            check_directory(file, size)
            self._archive = zipfile.ZipFile(file)
            self._open_archive(self._archive, size)
        else:
            file.seek(0)
            self._open_pickle(size)

    def tensors(self, stubs: dict[str, Stub], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of `stubs`, which is emptied; floating point ones as `dtype`. Each storage is read once."""
        by_storage: dict[Stored, list[str]] = {}
        for name, stub in stubs.items():
            by_storage.setdefault(stub.stored, []).append(name)
        numbers = sum(stub.numel for stub in stubs.values())
        if numbers > 4 * sum(stored.count for stored in by_storage) + MOST_TENSORS:
            raise RequestError("its tensors are many times larger than what is stored of them")
        read: dict[str, torch.Tensor] = {}
        for stored, names in by_storage.items():
            data = self._read(stored)
            own = [stubs[name].of(data, dtype) for name in names[:1]]
            own += [stubs[name].of(data, dtype).clone() for name in names[1:]]
            read.update(zip(names, own, strict=True))
        return {name: read[name] for name in stubs}

    # ---- zip archives -------------------------------------------------------------------------------------------------

    def _open_archive(self, archive: zipfile.ZipFile, size: int) -> None:
        self._members = {info.filename: info for info in check_members(archive, size)}
        data = [name for name in self._members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(data) != 1:
            raise RequestError("a zip archive without weights; unpack it and name the file inside")
        self._prefix = data[0].removesuffix("data.pkl")
        order = self._members.get(f"{self._prefix}byteorder")
        if order is not None and bytes(self._unpack(order, min(order.file_size, 9))) not in (b"little", b""):
            raise RequestError("its numbers are stored in big-endian order, which is not read here")
        script = f"{self._prefix}constants.pkl" in self._members
        info = self._members[data[0]]
        if info.file_size > MOST_PICKLED:
            raise RequestError(f"its {data[0]} of {info.file_size:,} bytes holds more than tensors' names")
        root = _Reader(io.BytesIO(self._unpack(info, info.file_size)), script).load()
        self.content = _script_tensors(root) if script else root

    def _read(self, stored: Stored) -> bytearray:
        wanted = stored.count * stored.dtype.itemsize
        if self._archive is None:
            self._file.seek(self._places[stored.key])
            data = bytearray(wanted)
            if self._file.readinto(data) != wanted:
                raise RequestError("torn: the numbers of its tensors end early")
            return data
        member = self._members.get(f"{self._prefix}data/{stored.key}")
        if member is None or member.file_size < wanted:
            raise RequestError(f"torn or damaged: tensor data {stored.key} is missing or shorter than it says")
        return self._unpack(member, wanted)

    def _unpack(self, member: zipfile.ZipInfo, wanted: int) -> bytearray:
        """The first `wanted` bytes of a member, its checksum compared where that is all of it."""
        data, at = bytearray(wanted), 0
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
            # As torch writes them: straight into place, in a third of the time `zipfile` takes. Torch can be told to write no
            # checksum; it is 0 then.
            self._file.seek(member.header_offset + 26)
            lengths = self._file.read(4)
            begin = member.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            self._file.seek(begin)
            whole = self._file.readinto(data) == wanted
            if not whole or (wanted == member.file_size and member.CRC not in (0, zlib.crc32(data))):
                raise RequestError(f"torn or damaged: {member.filename} is not what was written; fetch it again")
            return data
        assert self._archive is not None  # a member is of an archive
        with self._archive.open(member) as file, memoryview(data) as view:
            while at < wanted:
                # In pieces: what a compressed member gives at once could be more than its header says.
                part = file.read(min(1 << 22, wanted - at))
                if not part:
                    raise RequestError(f"torn or damaged: {member.filename} ends early")
                view[at : at + len(part)] = part
                at += len(part)
        return data

    # ---- bare pickles ---------------------------------------------------------------------------------------------------

    def _open_pickle(self, size: int) -> None:
        file = self._file
        if PlainUnpickler(file).load() != _MAGIC:
            file.seek(0)  # a pickle without torch's head; no tensors of it can be told
            self.content = _Reader(file, False).load()
            return
        if PlainUnpickler(file).load() != 1001:
            raise RequestError("torn or damaged: torch's old format of an unknown version")
        about = PlainUnpickler(file).load()
        if isinstance(about, dict) and about.get("little_endian") is False:
            raise RequestError("its numbers are stored in big-endian order, which is not read here")
        reader = _Reader(file, False)
        self.content = reader.load()
        for key in PlainUnpickler(file).load():
            stored = reader.stored[key] if type(key) is str else None
            count = int.from_bytes(file.read(8), "little")
            if stored is None or count != stored.count or file.tell() + count * stored.dtype.itemsize > size:
                raise RequestError("torn: the numbers of its tensors end early")
            self._places[key] = file.tell()
            file.seek(count * stored.dtype.itemsize, 1)
        if reader.stored.keys() - self._places.keys():
            raise RequestError("torn or damaged: numbers of its tensors are missing")


def check_directory(file: BufferedReader, size: int) -> None:
    """Refuse a zip archive whose list of members is so long that reading it would take minutes.

    Raises:
        RequestError: above 32 MiB.
    """
    file.seek(max(0, size - 66_000))
    tail = file.read()
    at, large = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    length = int.from_bytes(tail[at + 12 : at + 16], "little")
    if length == 0xFFFFFFFF and large >= 0:
        length = int.from_bytes(tail[large + 40 : large + 48], "little")
    if length > 32 << 20:
        raise RequestError(f"its list of members takes {length:,} bytes; no file of weights has so many")
    file.seek(0)


def check_members(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """The members of an archive that is no bomb: they neither overlap nor unpack to many times the file.

    Raises:
        RequestError: they do.
    """
    members = archive.infolist()
    unpacked, packed = sum(info.file_size for info in members), sum(info.compress_size for info in members)
    if packed > size:
        raise RequestError("its members lie over one another; no file of weights does that")
    if unpacked > MOST_RATIO * size + SLACK:
        raise RequestError(
            f"its {size:,} bytes would become {unpacked:,}; weights do not shrink like that. If you trust it, unpack it and "
            "zip it anew without compression (zip -0)"
        )
    return members


# ---- pickles ------------------------------------------------------------------------------------------------------------


class _Reader(PlainUnpickler):
    """Torch's pickles: tensors become stubs, classes stand-ins."""

    def __init__(self, file: BinaryIO, script: bool) -> None:
        super().__init__(file)
        self._script = script
        self.stored: dict[str, Stored] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(
            module, module
        )  # protocol 2 has Python 2's names
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module in ("torch", "torch.storage") and name.endswith("Storage") and name[:-7] in _STORAGES:
            return _Constant(_STORAGES[name[:-7]])
        if module == "torch" and name in _DTYPES:
            return _Constant(_DTYPES[name])
        if self._script and (module == "__torch__" or module.startswith("__torch__.")):
            return lambda *_: StandIn(f"{module}.{name}")
        if self._script and module == "torch.jit._pickle" and (name.startswith("build_") or name == "restore_type_tag"):
            return lambda value, *_: value
        if module.split(".")[0] in _HARMLESS_ROOTS or name in _HARMLESS.get(module, ()):
            return lambda *_: StandIn(f"{module}.{name}")
        raise pickle.UnpicklingError(f"it names {module}.{name}"[:200])

    def persistent_load(self, pid: Any) -> Stored:
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _Constant) or type(key) is not str or not _is_count(count) or view not in ([], [None]):
            raise ValueError("a storage that is none")
        stored = Stored(key, kind.value, count)
        if self.stored.setdefault(key, stored) != stored:
            raise ValueError(f"storage {key} has two kinds")
        return stored

    def build(self, built: Any, state: Any) -> None:
        if isinstance(built, StandIn) and isinstance(state, dict):
            built.state = state

    def put(self, place: Any, items: list[Any]) -> None:
        if not isinstance(place, StandIn):  # what a class beside the weights holds is left
            super().put(place, items)


class _Constant:
    """A type named by the file; it is passed on and not called."""

    def __init__(self, value: torch.dtype) -> None:
        self.value = value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _stub(stored: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Stub:
    whole = [*size, *stride, offset]
    if not isinstance(stored, Stored) or len(size) != len(stride) or len(size) > 64 or not all(map(_is_count, whole)):
        raise ValueError("a tensor that is none")
    dtype = dtype or stored.dtype
    count = stored.count * stored.dtype.itemsize // dtype.itemsize
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if numel else 0
    if numel > count or last >= max(count, 1) or offset > count:
        raise RequestError(f"torn or damaged: a tensor of shape {list(size)} lies beyond its {count:,} stored numbers")
    return Stub(stored, dtype, offset, tuple(size), tuple(stride))


def _part(value: Any) -> Stub:
    if not isinstance(value, Stub):
        raise ValueError("a parameter without a tensor")
    return value


def _with_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    return function(*args)


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): lambda stored, offset, size, stride, *_: _stub(stored, offset, size, stride),
    ("torch._utils", "_rebuild_tensor_v2"): lambda stored, offset, size, stride, *_: _stub(
        stored, offset, size, stride
    ),
    ("torch._utils", "_rebuild_tensor_v3"): lambda *args: _stub(args[0], args[1], args[2], args[3], args[6].value),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: _part(data),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: _part(data),
    ("torch._tensor", "_rebuild_from_type_v2"): _with_type,
    ("torch.nn.parameter", "Parameter"): lambda data=None, *_: data,
    ("torch", "Tensor"): lambda *_: StandIn("torch.Tensor"),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("collections", "OrderedDict"): lambda items=(): plain_items(items),
    ("collections", "defaultdict"): lambda *_: {},
    ("collections", "Counter"): lambda *_: {},
}


def _script_tensors(root: Any) -> dict[str, Stub]:
    """The tensors of a TorchScript module and the modules in it, by their paths."""
    if not isinstance(root, StandIn):
        raise RequestError("a TorchScript archive that holds no module")
    tensors: dict[str, Stub] = {}
    waiting, seen = [("", root)], 0
    while waiting:
        path, module = waiting.pop()
        seen += 1
        if seen > MOST_TENSORS or len(path) > 2000:  # a module that holds itself, or one twice, and so on
            raise RequestError("its modules hold one another without end")
        for name, value in module.state.items():
            if isinstance(value, Stub):
                tensors[f"{path}{name}"] = value
            elif isinstance(value, StandIn):
                waiting.append((f"{path}{name}.", value))
    return tensors
