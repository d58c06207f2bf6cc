"""Loader processes: what each does first, and what the end or the fault of one means in words."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading

from cnclip_ft.data.freed_memory import keep_pictures

_TOLD = re.compile(r"^(?:[\w.]+\.)?(\w*OSError|FileNotFoundError|PermissionError): ", re.M)


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
        _end_with_parent()
        # Blocked, not ignored: an ignored signal is dropped before it can be waited for.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_with_parent() -> None:
    """Elsewhere torch looks every few seconds whether the parent still lives."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
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
            f"memory ran out, and the system ended it. Give data.workers=N fewer processes (now {workers}; 0 decodes in "
            "the training process), or the machine (a container: --shm-size) more memory"
        )
    if said.startswith("Caught ") and "DataLoader worker process" in said:
        found = list(_TOLD.finditer(said))
        return said[found[-1].end() :].strip().rstrip(".") if found else None
    return None
