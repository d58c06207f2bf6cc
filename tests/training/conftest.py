"""Stores shared by the tests of runs."""

from __future__ import annotations

import pytest
import torch

from tests.training.helpers import write_stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def one_thread():
    """As launched processes have: another number of threads may round the last bit otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
