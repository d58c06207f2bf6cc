"""Stores and folders shared by the tests of families."""

from __future__ import annotations

import functools

import pytest

from tests.families.cards import CARDS
from tests.families.encoders import ENCODERS
from tests.training.helpers import write_stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))


def written_once(place, known):
    """Folder of one of `known` by its name, below `place`; written when it is first asked for."""
    return functools.cache(lambda name: known[name].write(place / name.replace(" ", "-")))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return written_once(tmp_path_factory.mktemp("encoders"), ENCODERS)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    return written_once(tmp_path_factory.mktemp("families"), CARDS)
