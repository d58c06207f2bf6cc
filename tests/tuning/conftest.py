"""Stores for searches: forty pictures to train on, twelve to judge by."""

from __future__ import annotations

import pytest

from tests.evaluation.tiny import make_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    make_store(folder / "train", images=40)
    make_store(folder / "valid", images=12)
    return folder
