"""Runs on shards as they lie: the losses of the store that is imported from them, stopped and continued, damaged members passed over."""

from __future__ import annotations

import json
import shutil

import pytest

from cnclip_ft.recipe_files import load_recipe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError, UserError
from data_tools.shards import open_pairs
from tests.data_tools.samples import picture
from tests.data_tools.shard_samples import imported, rows, samples, write_parquet, write_tar
from tests.training.helpers import losses, one_stage, planned, records, stopped_after
from tests.training.test_processes import run as run_processes

STAGE = {"validate_every": 6}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same pairs three times, each as train and valid."""
    pytest.importorskip("webdataset")
    top = tmp_path_factory.mktemp("places")
    for split, firsts in (("train", (8, 0, 16)), ("valid", (100, 104))):
        for number, first in enumerate(firsts):
            some = samples(first, 8 if split == "train" else 4, captions=1 + number)
            write_tar(top / "tars" / split / f"{number:05d}.tar", some)
            write_parquet(top / "parquet" / split / f"{number:05d}.parquet", rows(some), row_group_size=3)
        imported("webdataset", top / "tars" / split, top / "store" / split)
    return top


def recipe(place, output, **changes):
    model = {"model": {"start": {"architecture": "tiny"}}}
    return one_stage(place, output, STAGE, **model, **changes)


@pytest.fixture(scope="module")
def of_store(places):
    assert train(recipe(places / "store", places / "run-store"))
    return places / "run-store"


def scores(run):
    return [{name: value for name, value in record["scores"].items()} for record in records(run, "validation")]


@pytest.mark.parametrize("kind", ["tars", "parquet", "pattern", "workers"])
def test_losses_are_those_of_the_store(places, of_store, tmp_path, kind) -> None:
    wanted = recipe(places / ("parquet" if kind == "parquet" else "tars"), tmp_path / "run")
    if kind == "pattern":
        wanted.data.train = f"{places}/tars/train/{{00000..00002}}.tar"
    if kind == "workers":
        wanted.data.workers = 1
    assert train(wanted)
    assert losses(tmp_path / "run") == losses(of_store) and scores(tmp_path / "run") == scores(of_store)


def test_a_stopped_run_goes_on_with_the_very_losses(places, of_store, tmp_path) -> None:
    wanted = recipe(places / "tars", tmp_path / "run")
    assert not train(wanted, **stopped_after(("learn", 2)))
    assert train(load_recipe(tmp_path / "run" / "recipe.yaml"), proceed=True)
    assert losses(tmp_path / "run") == losses(of_store)


def test_a_run_does_not_go_on_with_other_shards(places, tmp_path, capsys) -> None:
    shutil.copytree(places / "tars", tmp_path / "tars")
    assert not train(recipe(tmp_path / "tars", tmp_path / "run"), **stopped_after(("learn", 2)))
    write_tar(tmp_path / "tars" / "train" / "00001.tar", samples(50, 8))
    with pytest.raises(UserError):
        train(load_recipe(tmp_path / "run" / "recipe.yaml"), proceed=True)
    assert "00001.tar is not the shard it was" in capsys.readouterr().err


def test_several_places_are_a_mixture(places, tmp_path) -> None:
    wanted = recipe(places / "store", tmp_path / "run")
    both = [
        {"store": f"{places}/tars/train/0000{{0..1}}.tar"},
        {"store": str(places / "parquet" / "train"), "weight": 2},
    ]
    wanted = wanted.model_validate(
        wanted.model_dump(mode="json") | {"data": {**wanted.data.model_dump(mode="json"), "train": both}}
    )
    assert train(wanted) and len(losses(tmp_path / "run")) == 6
    both[1] = {"store": f"{places}/tars/train/00001.tar"}
    wanted = wanted.model_validate(
        wanted.model_dump(mode="json") | {"data": {**wanted.data.model_dump(mode="json"), "train": both}}
    )
    with pytest.raises(RequestError, match=r"data.train.1.store: .*00001.tar belongs to .* before as well"):
        planned(wanted)


def test_damaged_members_are_passed_over_and_limited(places, tmp_path) -> None:
    about = {"json": json.dumps({"caption": "坏"}).encode()}
    bad = [
        ("x", {"jpg": picture(1)[:200], **about}),
        ("y", {"jpg": picture(2)}),
        ("z", {"jpg": picture(3), "json": b"{"}),
    ]
    write_tar(tmp_path / "p" / "train" / "0.tar", bad + samples(0, 7))
    shutil.copytree(places / "tars" / "valid", tmp_path / "p" / "valid")
    wanted = recipe(tmp_path / "p", tmp_path / "run")
    wanted.data.max_damaged_images = 1
    with pytest.raises(
        RequestError,
        match="data.train: .*2 members or samples give no pair .*0.tar: y: no caption.*max_damaged_images=4",
    ):
        planned(wanted)
    wanted.data.max_damaged_images = 20
    assert train(wanted)
    damaged = records(tmp_path / "run", "damaged")
    assert damaged and "0.tar" in json.dumps(damaged[0]) or "'x'" in json.dumps(damaged[0])
    assert len(open_pairs(tmp_path / "p" / "train")) == 8


@pytest.mark.slow
def test_two_processes_share_the_index_and_have_the_losses_of_the_store(places, tmp_path) -> None:
    for kind in ("tars", "store"):
        shutil.copytree(places / kind, tmp_path / kind, ignore=shutil.ignore_patterns("cnclip-ft.*"))
    tars, store = (run_processes(tmp_path / kind, "two", 2) for kind in ("tars", "store"))
    assert losses(tars) == losses(store) and len(losses(tars)) == 12
    one = losses(run_processes(tmp_path / "tars", "one", 1))
    assert one == pytest.approx(losses(tars), abs=1e-4)
