"""A format that is one file and its names: written, compared, replaced and read as those of the package. This file is it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cnclip_ft.export import run
from cnclip_ft.export.run import export_checkpoint
from cnclip_ft.models import known
from cnclip_ft.models.assembly import Checkpoint, describe_model
from cnclip_ft.models.checkpoints import file_tensors, load, save_checkpoint
from cnclip_ft.models.description import checked_description
from cnclip_ft.models.registry import family_of
from cnclip_ft.models.start import build_start
from data_tools.errors import RequestError
from data_tools.outputs import FolderKind, folder_with
from tests.models.helpers import equal, small, tensors

# ---- the format ---------------------------------------------------------------------------------------------------

KIND = FolderKind("folder of arrays", folder_with("arrays.json", "model"), re.compile(r"arrays\.(npz|json)"))
DTYPES = {"float32": torch.float32}


def check(model):
    if model.heads is not None:
        raise RequestError("--to arrays has no place for learnt boxes")


def write(model, target, order):
    target.mkdir()
    np.savez(target / "arrays.npz", **{name: tensor.numpy() for name, tensor in file_tensors(model).items()})
    (target / "arrays.json").write_text(json.dumps({"model": describe_model(model), "info": order.info}))


def open_encoder(target):
    return load(target)


def read_features(target, pixels, texts):
    model = open_encoder(target)
    return model.image_features(pixels), model.encode_texts(texts)


def advice(model, output):
    return f"numpy.load('{output}/arrays.npz')"


def is_here(folder: Path) -> bool:
    return (folder / "arrays.json").is_file()


def read(folder: Path, dtype: torch.dtype) -> Checkpoint:
    description = json.loads((folder / "arrays.json").read_text(encoding="utf-8"))["model"]
    with np.load(folder / "arrays.npz") as file:
        found = {name: torch.from_numpy(file[name]).to(dtype) for name in file.files}
    return Checkpoint(str(folder), checked_description(description, str(folder)), found)


# ---- what it goes through -----------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A checkpoint, and the same as arrays."""
    model = small()
    family = type(family_of(model.text_tower))
    monkeypatch.setitem(run.FORMATS, "arrays", __name__)
    monkeypatch.setitem(known.FOLDERS, "arrays", (f"{__name__}:is_here", f"{__name__}:read"))
    monkeypatch.setattr(family, "exports", (*family.exports, "arrays"))
    save_checkpoint(model, tmp_path / "a", info={})
    done = export_checkpoint(tmp_path / "a", "arrays", tmp_path / "b")
    assert done.difference < 1e-6 and "arrays.npz" in done.advice
    return tmp_path


def test_it_is_read_whole_and_by_halves(written):
    assert equal(tensors(load(written / "b")), tensors(small()))
    assert equal(tensors(build_start(str(written / "b"))[0]), tensors(small()))
    halves = {"image": str(written / "b"), "text": str(written / "b")}
    made, report = build_start(halves)
    assert equal(made.image_tower.state_dict(), small().image_tower.state_dict())
    assert {source for _, source in report.loaded} == {str(written / "b")}


def test_it_is_replaced_where_that_is_asked_for(written):
    with pytest.raises(RequestError, match="is there already"):
        export_checkpoint(written / "a", "arrays", written / "b")
    export_checkpoint(written / "a", "huggingface", written / "b", overwrite=True)
    export_checkpoint(written / "a", "arrays", written / "b", overwrite=True)
    assert sorted(path.name for path in (written / "b").iterdir()) == ["README.md", "arrays.json", "arrays.npz"]


def test_where_nobody_names_it_the_folder_is_none(written, monkeypatch):
    monkeypatch.delitem(known.FOLDERS, "arrays")
    with pytest.raises(RequestError, match="not a checkpoint"):
        load(written / "b")
