"""Put the project's root on the path, so that tests import `tests.official` and run without installation; devices."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is printed is compared with English on lines as long as they come, whoever runs the tests; side by side, pytest-xdist says 80 columns.
for _name in ("LC_ALL", "LC_MESSAGES", "COLUMNS"):
    os.environ.pop(_name, None)
os.environ["LANG"] = "C.UTF-8"
# Before CUDA starts: matrix products that give the same bits every time need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_ignore_collect(collection_path, config):
    """With `-m cuda` alone only files are read that ask for a device: a machine with a card may lack what the others import."""
    if config.option.markexpr == "cuda" and re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None if re.search(r"def \w+\([^)]*\bdevice\b", collection_path.read_text(encoding="utf-8")) else True
    return None


def pytest_collection_modifyitems(config, items):
    """On a card those that compile come last: where the time is short, the others have been run."""
    if config.option.markexpr == "cuda":
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _interrupts_stay_pytests():
    """`cnclip_ft.cli.main` leaves the process to Ctrl-C when it ends."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def letters():
    """The family of `tests.families.letters` is known in the tests of the module from here on, and in no others."""
    from cnclip_ft.models import registry

    before = list(registry._registered)
    from tests.families import letters

    registry.register(letters.FAMILY)
    yield letters
    registry._registered[:] = before


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Every device there may be; a run made inside the test takes it."""
    import torch
    from accelerate.state import AcceleratorState

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if request.param == "cpu":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the run before
    yield torch.device(request.param)
    AcceleratorState._reset_state(reset_partial_state=True)
