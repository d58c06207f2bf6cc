"""Runs whose table of pairs lies on the disk, and runs that read their pairs in runs of neighbours."""

from __future__ import annotations

import pytest

import cnclip_ft.data.pairs as pairs
from cnclip_ft.training.plan import describe
from cnclip_ft.training.run import train
from data_tools.errors import RequestError
from tests.training.helpers import losses, planned, stopped_after, tiny_recipe
from tests.training.test_continuing import same_end


def recipe_of(stores, output, **data):
    places = {"train": str(stores / "train"), "valid": str(stores / "valid"), "workers": 0}
    return tiny_recipe(
        stores, output=str(output), feature_cache=str(stores / "cache"), data={**places, **data}, contrast={"steps": 2}
    )


def test_a_kept_table_gives_the_same_run_stopped_or_not(stores, tmp_path, monkeypatch, capsys):
    assert train(recipe_of(stores, tmp_path / "memory"))
    monkeypatch.setattr(pairs, "KEPT_FROM", 0)
    place = tmp_path / "tables"
    recipe = recipe_of(stores, tmp_path / "kept", table_cache=str(place))
    assert not train(recipe, **stopped_after(("align", 4)))
    assert "its table of" in capsys.readouterr().err
    assert train(recipe, proceed=True)
    assert "its table of" not in capsys.readouterr().err and len(list(place.iterdir())) == 1
    assert losses(tmp_path / "kept") == losses(tmp_path / "memory")
    assert same_end(tmp_path / "kept", tmp_path / "memory")


@pytest.mark.slow
def test_an_order_in_runs_is_said_and_goes_on(stores, tmp_path):
    recipe = recipe_of(stores, tmp_path / "runs", order="by_shard", order_window=32)
    assert "an epoch is read in runs of 2 pairs that lie behind one another; 32 pairs" in describe(*planned(recipe))
    assert "in runs of" not in describe(*planned(recipe_of(stores, tmp_path / "global")))
    assert not train(recipe, **stopped_after(("align", 4)))
    with pytest.raises(RequestError, match="data.order: 'by_shard' → 'global'"):
        train(recipe_of(stores, tmp_path / "runs", order_window=32), proceed=True)
    assert train(recipe, proceed=True)
