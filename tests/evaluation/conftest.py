"""A small store and checkpoint, shared by the tests of evaluation."""

from __future__ import annotations

import pytest

from tests.evaluation import tiny


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("data") / "valid")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best")
