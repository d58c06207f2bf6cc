"""What tests of shards share: a cache of their own, and three tars."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_tools.shard_samples import three_tars


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("CNCLIP_FT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tars(tmp_path) -> Path:
    return three_tars(tmp_path / "tars")
