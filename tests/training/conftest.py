"""Stores shared by the tests of runs."""

from __future__ import annotations

import pytest

from tests.training.helpers import write_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "train", images=20, captions=2, seed=0)
    write_store(folder / "valid", images=10, captions=2, seed=1)
    return folder
