"""Stores shared by the tests of runs."""

from __future__ import annotations

import pytest

from tests.training.helpers import write_stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))
