"""Put the project's root on the path, so that tests import `tests.official` and run without installation; devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before CUDA starts: matrix products that give the same bits every time need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
