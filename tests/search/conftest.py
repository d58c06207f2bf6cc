"""A tiny checkpoint, pictures in a folder and in a store, and indexes of both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cnclip_ft.evaluation.options import Options
from cnclip_ft.search.index.renewal import Wishes, build_index
from data_tools.store import StoreWriter
from tests.evaluation import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("data") / "valid", images=30)


@pytest.fixture(scope="session")
def photos_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "photos"
    for number in range(20):
        path = folder / ("雪 地" if number % 2 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.png(number))
    return folder


@pytest.fixture
def photos(photos_once, tmp_path):
    """Twenty pictures in two folders, to be changed at will."""
    shutil.copytree(photos_once, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture(scope="session")
def make():
    """Build an index on the CPU; gives what was said."""

    def build(checkpoint: Path, what: Path, output: Path, **wishes) -> str:
        said: list[str] = []
        options = Options(batch_size=wishes.pop("batch_size", 8), workers=wishes.pop("workers", 0), device="cpu")
        build_index(checkpoint, what, output, options, Wishes(**wishes), said.append)
        return "\n".join(said)

    return build


@pytest.fixture(scope="session")
def index(make, checkpoint, photos_once, tmp_path_factory):
    """An index of twenty pictures whose source is not to be touched."""
    folder = tmp_path_factory.mktemp("index") / "photos.index"
    make(checkpoint, photos_once, folder)
    return folder


@pytest.fixture(scope="module")
def engine(index):
    from cnclip_ft.search.engine.engine import open_engine

    return open_engine(index, device="cpu")


@pytest.fixture(scope="module")
def client(engine):
    from fastapi.testclient import TestClient

    from cnclip_ft.search.web.api import Limits, make_app
    from tests.search.server import LOCAL

    limits = Limits(upload_bytes=2**20, pixels=4_000_000)
    with TestClient(make_app(engine, threshold=0.25, limits=limits), LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def shop(make, checkpoint, tmp_path_factory):
    """An index of a store of 130 pictures of which titles, categories, prices and links are kept."""
    folder = tmp_path_factory.mktemp("shop")
    with StoreWriter(folder / "valid") as writer:
        for number in range(130):
            kept = {"标题": f"第 {number} 件", "类目": "女装" if number % 3 else "鞋", "价格": f"{number}.50"}
            link = f"https://shop.example/{number}" if number % 2 else "javascript:alert(1)"
            writer.add_image(number, tiny.png(number), columns=kept | {"链接": link})
            writer.add_pair(number, number, f"东西 {number}", "zh")
        writer.finish()
    make(checkpoint, folder / "valid", folder / "index", batch_size=64)
    return folder / "index"


@pytest.fixture(scope="module")
def chromium():
    from tests import browser as browsers  # needs selenium

    with browsers.browser() as driver:
        yield driver
