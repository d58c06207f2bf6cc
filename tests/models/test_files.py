"""Files of weights: kinds recognised from content, nothing executed, faults in one sentence."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from cnclip_ft.models.files import read_file, read_folder
from data_tools.errors import RequestError
from tests.models.helpers import Bomb

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.half": torch.arange(4.0).half(), "count": torch.tensor(7)}


def check(tensors):
    assert tensors.keys() == STATE.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, STATE[name].float() if tensor.is_floating_point() else STATE[name])
    assert tensors["count"].dtype == torch.int64 and tensors["a.half"].dtype == torch.float32


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "anything"])
def test_kind_comes_from_content_not_from_the_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    check(read_file(tmp_path / name).tensors)
    torch.save(STATE, tmp_path / name)
    check(read_file(tmp_path / name).tensors)
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    check(read_file(tmp_path / name).tensors)


def test_plain_values_beside_a_state_dict_are_kept(tmp_path):
    torch.save({"epoch": 3, "name": "x", "optimizer": {"state": {}}, "state_dict": STATE}, tmp_path / "x.pt")
    content = read_file(tmp_path / "x.pt")
    check(content.tensors)
    assert content.extras == {"epoch": 3, "name": "x"}


def test_other_precision(tmp_path):
    save_file(STATE, tmp_path / "x")
    read = read_file(tmp_path / "x", torch.bfloat16).tensors
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16, torch.int64}


def test_nothing_stays_mapped_to_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    read = read_file(path).tensors
    with open(path, "r+b") as file:  # what a mapping would show
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert read["a"].sum() == 1000


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Parameter(torch.randn(3, 4).half())
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(3)])
        self.numbers, self.names = [1, 2], {"a": 1.0}

    def forward(self, x):
        return x


class Outer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, self.logit_scale = Inner(), torch.nn.Parameter(torch.tensor(4.6))
        self.register_buffer("context_length", torch.tensor(77))

    def forward(self, x):
        return self.visual(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_archive_is_read_without_its_code(tmp_path, monkeypatch):
    module = Outer()
    torch.jit.script(module).save(str(tmp_path / "x.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("the archive's code was loaded"))
    read = read_file(tmp_path / "x.pt").tensors
    expected = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in module.state_dict().items()
    }
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)


def test_shards(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert read_folder(tmp_path).tensors.keys() == {"a", "b"}
    index["weight_map"]["b"] = "../outside"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(RequestError, match="outside of its folder"):
        read_folder(tmp_path)
    index["weight_map"]["b"] = "model-3.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(RequestError, match="model-3.safetensors: no such file"):
        read_folder(tmp_path)


BYTES = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello, this is no checkpoint", "neither a safetensors nor a torch file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
    "head": (b"\xff" * 7 + b"\x7f" + b"{" * 80, "torn or damaged"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_other_files_are_named_for_what_they_are(tmp_path, kind):
    content, message = BYTES[kind]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        read_file(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("keep", [20, 400, -30])
@pytest.mark.parametrize("kind", ["zip", "safetensors", "pickle"])
def test_torn_files(tmp_path, kind, keep):
    path = tmp_path / "x.pt"
    state = {"a": torch.randn(200, 3), "b": torch.randn(50)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RequestError, match="torn"):
        read_file(path)


@pytest.mark.parametrize("kind", ["pickle", "zip", "torch"])
def test_code_in_a_file_is_not_executed(tmp_path, kind):
    path, trace = tmp_path / "x.pt", tmp_path / "executed"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(trace)}))
    elif kind == "torch":
        torch.save({"state_dict": {"a": Bomb(trace)}}, path)
    else:  # a TorchScript archive whose data calls a function
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/constants.pkl", pickle.dumps(()))
            archive.writestr("x/data.pkl", pickle.dumps(Bomb(trace), protocol=2))
    with pytest.raises(RequestError, match="refused, reading it would run code"):
        read_file(path)
    assert not trace.exists()


def test_whole_modules_and_other_content_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(RequestError, match="refused.*Linear"):
        read_file(tmp_path / "m.pt")
    torch.save([1, 2], tmp_path / "l.pt")
    with pytest.raises(RequestError, match="no state dict in it \\(a list\\)"):
        read_file(tmp_path / "l.pt")
    torch.save({"a": torch.ones(1), "b": "text"}, tmp_path / "d.pt")
    with pytest.raises(RequestError, match="b is not tensors|b is"):
        read_file(tmp_path / "d.pt")
    with pytest.raises(RequestError, match="no such file"):
        read_file(tmp_path / "none.pt")
    with pytest.raises(RequestError, match="no weights in it"):
        read_folder(tmp_path)
