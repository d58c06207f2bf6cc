"""What a run stands on: the number format of its device, loader processes and their faults, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # accelerate needs it too
import torch
from torch.utils.data import DataLoader

from data_tools.errors import RequestError, UserError
from data_tools.words import Said

_TOLD = re.compile(r"^(?:[\w.]+\.)?(\w*OSError|FileNotFoundError|PermissionError): ", re.M)
_OURS = re.compile(r"\n(?:data_tools|cnclip_ft)[\w.]*\.(\w+): (.*)\Z", re.DOTALL)


def parse_device(name: str | torch.device | None) -> torch.device:
    """The named device; None or ``auto`` is the best that is there: CUDA, MPS, CPU.

    Raises:
        RequestError: torch does not know it, or it is not there.
    """
    if name is None or name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); use auto, cpu, cuda or mps"
        ) from None
    return device


# ---- memory ---------------------------------------------------------------------------------------------------------


def keep_activations(device: torch.device, keep: bool | None = None) -> None:
    """Before a model works on the CPU, batch after batch: fetching its memory anew takes a fifth of the time.

    Kept memory has holes that the next block is too large for (`KEPT`).

    Args:
        keep: False gives larger blocks back at once; None is what was said before, at first True.
    """
    global _keeps
    if device.type == "cpu":
        _keeps = _keeps if keep is None else keep
        _keep(*((2**30, 2**31 - 1) if _keeps else (2**20, 2**20)))


_keeps = True
# What a process then holds, over what is in use at most. The C library (glibc 2.36) needs a little more than an aligned block
# to make one of its size, so a hole that has just come free is passed over. Measured with transformers and convolutions.
KEPT = 1.4


def keep_pictures(_worker: int = 0) -> None:
    """`worker_init_fn` of loaders that decode pictures."""
    _keep(32 * 2**20, 256 * 2**20)


def _keep(block: int, total: int) -> None:
    """Pieces up to `block` bytes are kept, and at the end of the heap up to `total`."""
    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    if (mallopt := _of_glibc("mallopt")) is not None:
        mallopt(trim_threshold, total)
        mallopt(mmap_threshold, block)


def can_keep() -> bool:
    """Whether freed memory can be kept: not with another C library."""
    return _of_glibc("mallopt") is not None


def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found


def available_memory() -> int:
    """Bytes that processes of this machine, or of this control group (a container, a job), may still take.

    What this process keeps without using is given back first.
    """
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_in_groups(own: Path, mount: Path) -> Iterator[int]:
    """What the control groups of a process leave, those of version 2 (``0::/a/b``) and 1 (``9:memory:/a/b``) of the kernel's."""
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, kind, path = line.split(":", 2)
        if kind == "":
            root, limit, taken, spare = mount, "memory.max", "memory.current", "inactive_file"
        elif kind == "memory":
            root, limit, taken = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            spare = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                try:
                    most = int((folder / limit).read_text())
                    used = int((folder / taken).read_text())
                    files = re.search(rf"^{spare} (\d+)$", (folder / "memory.stat").read_text(), re.M)
                except (OSError, ValueError):  # not in sight from inside a container; "max"
                    continue
                yield max(most - used + (int(files[1]) if files else 0), 0)


# ---- to and from a device without waiting ---------------------------------------------------------------------------


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on the device; the CPU goes on while it is copied, which takes memory that stays in its place."""
    if tensor.device == device:
        return tensor
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if torch.compiler.is_compiling():  # pinning is not traced
        return tensor.to(device, non_blocking=True)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


class Fetched:
    """A tensor on its way from the device: asked for here, there when the device has done what was asked of it before."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._done = None
        if tensor.device.type == "cuda":
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._here = tensor.cpu()

    def __call__(self) -> torch.Tensor:
        """On the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._here


class Reading:
    """Scalars by name, `Fetched` together."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self._names = list(values)
        self._numbers = Fetched(torch.stack([value.detach().float() for value in values.values()]))

    def __call__(self) -> dict[str, float]:
        return dict(zip(self._names, self._numbers().tolist(), strict=True))


# ---- number format --------------------------------------------------------------------------------------------------


_ASKED_FOR = Said("asked for", "按要求")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(``fp32`` | ``bf16`` | ``fp16``, reason). Weights, optimizer and logits stay in fp32 in every case.

    Raises:
        RequestError: a format was asked for that the device does not compute in.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not has_bf16:
            raise RequestError(
                f"precision: bf16, but {torch.cuda.get_device_name(device)} has none: precision=auto or precision=fp16"
            )
        if wanted != "auto":
            return wanted, _ASKED_FOR
        name = torch.cuda.get_device_name(device)
        if has_bf16:
            return "bf16", Said(
                "{name} has bf16: the range of fp32, no loss scaling",
                "{name} 支持 bf16：范围同 fp32，无需缩放损失",
                name=name,
            )
        return "fp16", Said(
            "{name} has no bf16; fp16 with loss scaling", "{name} 没有 bf16；用 fp16 并缩放损失", name=name
        )
    if wanted == "fp16":
        raise RequestError(
            f"precision: fp16 needs a CUDA device, this run is on {device.type}: precision=auto, precision=fp32 or precision=bf16"
        )
    if wanted != "auto":
        return wanted, _ASKED_FOR
    if device.type == "cpu" and _multiplies_bf16():
        return "fp32", Said(
            "cpu: as exact as can be; this processor multiplies bf16 by itself, precision=bf16 trains faster",
            "cpu：尽可能精确；这颗处理器自带 bf16 乘法，precision=bf16 训练更快",
        )
    return "fp32", Said(
        "{device}: mixed precision brings nothing sure here",
        "{device}：混合精度在这里没有确定的好处",
        device=device.type,
    )


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for it: without them bf16 is slower than fp32."""
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # releases before have none
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


# ---- loader processes -----------------------------------------------------------------------------------------------


def start_worker(_worker: int = 0) -> None:
    """`worker_init_fn` of every loader.

    A stop sent to the whole process group (Ctrl-C, timeout, systemd, Slurm) is for the parent to answer: it takes its last step
    and says goodbye, for which it needs its loaders. They end on the parent's word, and with it.
    """
    keep_pictures()
    for name in ("SIGINT", "SIGHUP", "SIGTERM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        end_with_parent(signal.SIGKILL)
        # Blocked, not ignored: an ignored signal is dropped before it can be waited for.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def end_with_parent(number: int) -> None:
    """Have Linux send this process the signal when its parent is gone. Elsewhere torch looks every few seconds for its loaders."""
    try:
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def _end_when_told(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


def loader_fault(error: BaseException, workers: int) -> str | None:
    """What went wrong in or with a loader process, in words; None where the error is another."""
    said = str(error)
    if re.search(r"DataLoader worker \(pid.*\) (is killed by|exited)", said):
        return (
            f"a process that loads pictures was ended from outside ({said.split('. It is possible')[0].strip().rstrip('.')}). Mostly "
            f"memory ran out, and the system ended it. Give fewer processes, data.workers={workers // 2} (now {workers}; 0 decodes in "
            "the training process), or the machine (a container: --shm-size) more memory"
        )
    if said.startswith("Caught ") and "DataLoader worker process" in said:
        found = list(_TOLD.finditer(said))
        return said[found[-1].end() :].strip().rstrip(".") if found else None
    return None


def from_workers(loader: DataLoader) -> Iterator[Any]:
    """Batches of `loader`.

    Raises:
        UserError: with its message alone, where torch would send the traceback of the worker as text.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (UserError, RuntimeError, TypeError) as error:
            ours = _OURS.search(str(error)) if str(error).startswith("Caught ") else None
            if ours is None:
                raise
            raise UserError(ours[2].strip()) from None
        yield batch
