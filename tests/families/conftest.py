"""Stores and folders shared by the tests of families."""

from __future__ import annotations

import pytest

from tests.families.encoders import ENCODERS
from tests.training.helpers import write_stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folder of an encoder by its name; written once."""
    place, made = tmp_path_factory.mktemp("encoders"), {}

    def folder(name: str):
        if name not in made:
            made[name] = ENCODERS[name].write(place / name.replace(" ", "-"))
        return made[name]

    return folder
