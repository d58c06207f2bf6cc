"""Files of weights: kinds recognised from content, nothing executed, faults in one sentence."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cnclip_ft.models.formats.files import read_file, read_folder, read_json
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
    with pytest.raises(RequestError, match="names model-3.safetensors, which is not there. Fetch it: hf download"):
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


# ---- files that mean no good ----------------------------------------------------------------------------------------


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)
    return path


def tensor_pickle(count=4, offset=0, size=(2, 2), stride=(2, 1), kind="FloatStorage", key="0", where="torch"):
    """``{"a": tensor}`` as torch writes it, with numbers of one's own."""
    out = io.BytesIO()
    pickler = pickle._Pickler(out, 2)
    out.write(b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((")
    pickler.save("storage")
    out.write(f"c{where}\n{kind}\n".encode())
    for value in (key, "cpu", count):
        pickler.save(value)
    out.write(b"tQ")
    for value in (offset, tuple(size), tuple(stride), False, None):
        pickler.save(value)
    out.write(b"tRs.")
    return out.getvalue()


def test_a_tensor_of_ones_own(tmp_path):
    path = zipped(tmp_path / "x.pt", {"data.pkl": tensor_pickle(), "data/0": torch.arange(4.0).numpy().tobytes()})
    assert read_file(path).tensors["a"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "numbers",
    [
        {"offset": 1},
        {"size": (2, 3)},
        {"stride": (3, 1)},
        {"stride": (0, 0), "size": (1000, 1000)},
        {"offset": -1},
        {"size": (-2, 2)},
        {"count": 400},
        {"count": -4},
        {"count": 2**62},
        {"size": (2**40, 2**40), "stride": (0, 0)},
        {"stride": (2,)},
        {"size": ("a", 2)},
        {"kind": "NoStorage"},
        {"key": "1"},
        {"where": "os"},
        {"offset": 2**63},
        {"size": (2,) * 80, "stride": (0,) * 80},
    ],
)
def test_tensors_beyond_what_is_stored_are_refused(tmp_path, numbers):
    path = zipped(tmp_path / "x.pt", {"data.pkl": tensor_pickle(**numbers), "data/0": bytes(16)})
    with pytest.raises(RequestError, match="x.pt"):
        read_file(path)


def test_checksums_of_an_archive(tmp_path):
    state = {"a": torch.arange(1000.0)}
    torch.save(state, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.find(state["a"].numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RequestError, match="x/data/0 is not what was written"):
        read_file(tmp_path / "x.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "none.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_file(tmp_path / "none.pt").tensors["a"], state["a"])


def test_many_tensors_of_few_numbers(tmp_path):
    torch.save({f"t{i}": t for t in [torch.zeros(200_000)] for i in range(30)}, tmp_path / "x.pt")
    with pytest.raises(RequestError, match="many times larger than what is stored"):
        read_file(tmp_path / "x.pt")
    tied = torch.ones(3, 3)
    torch.save({"a": tied, "b": tied, "c": tied.T}, tmp_path / "y.pt")
    read = read_file(tmp_path / "y.pt").tensors
    assert len({t.data_ptr() for t in read.values()}) == 3 and all(t.sum() == 9 for t in read.values())


def test_archives_that_unpack_to_much_more(tmp_path):
    small = {"data.pkl": tensor_pickle(count=2**25, size=(2**25,), stride=(1,)), "data/0": bytes(2**27)}
    path = zipped(tmp_path / "x.pt", small, zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="would become 134.*weights do not shrink"):
        read_file(path)
    path = zipped(tmp_path / "ts.pt", {"constants.pkl": b"\x80\x02).", **small}, zipfile.ZIP_DEFLATED)
    with pytest.raises(RequestError, match="weights do not shrink"):
        read_file(path)


def test_a_head_that_lies_about_a_member(tmp_path):
    """The list says 16 bytes, the stream holds 100 MB: no more is unpacked than was said."""
    members = {"data.pkl": tensor_pickle(), "data/0": bytes(100_000_000)}
    path = zipped(tmp_path / "x.pt", members, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02") + 24
    content[at : at + 4] = (16).to_bytes(4, "little")
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(RequestError, match="torn or damaged"):
        read_file(path)
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


def test_members_over_one_another(tmp_path):
    path = zipped(tmp_path / "x.pt", {"data.pkl": tensor_pickle(), **{f"data/{i}": bytes(100_000) for i in range(3)}})
    content, at = bytearray(path.read_bytes()), 0
    first = None
    while (
        at := content.find(b"PK\x01\x02", at)
    ) >= 0:  # every member begins where the first does, and is as long as the file
        first = first or content[at + 42 : at + 46]
        content[at + 42 : at + 46] = first
        content[at + 20 : at + 28] = (290_000).to_bytes(4, "little") * 2
        at += 4
    path.write_bytes(content)
    with pytest.raises(RequestError, match="lie over one another"):
        read_file(path)


def test_a_script_module_that_holds_itself(tmp_path):
    body = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    path = zipped(tmp_path / "x.pt", {"constants.pkl": b"\x80\x02).", "data.pkl": body})
    with pytest.raises(RequestError, match="hold one another without end"):
        read_file(path)


def test_what_trainers_keep_beside_their_weights_is_left(tmp_path):
    beside = {
        "args": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("a")), "best": np.float64(1.5), "rng": np.arange(3), "when": {1, 2},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]},
        "betas": (0.9, 0.98), "counts": collections.Counter("ab"), "more": collections.defaultdict(list),
    }  # fmt: skip
    for new in (True, False):
        torch.save(
            beside | {"state_dict": collections.OrderedDict(STATE), "epoch": 2},
            tmp_path / "x.pt",
            _use_new_zipfile_serialization=new,
        )
        content = read_file(tmp_path / "x.pt")
        check(content.tensors)
        assert content.extras["epoch"] == 2 and "optimizer" not in content.extras and "args" not in content.extras


def test_only_regular_files_are_read(tmp_path):
    for name in ("x.pt", "model.safetensors", "model.safetensors.index.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RequestError, match="a pipe or a device"):
            read_file(tmp_path / name)
    with pytest.raises(RequestError, match="model.safetensors: a pipe"):
        read_folder(tmp_path)
    with pytest.raises(RequestError, match="a pipe or a device"):
        read_file("/dev/zero")
    with pytest.raises(RequestError, match="a folder"):
        read_file(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"a": 5},
        ["a"],
        {},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "..\\\\x"},
        {"a": "."},
        {"b": "one.safetensors"},
    ],
)
def test_lists_of_shards_that_are_none(tmp_path, content):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}), encoding="utf-8")
    with pytest.raises(RequestError, match="index.json|passwd|fetch|folder"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '"x"', "nul", "\x00"])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match="x.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}},
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": []},
    ],
)
def test_safetensors_that_lie(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(RequestError, match="torn or damaged"):
        read_file(tmp_path / "x")
    (tmp_path / "y").write_bytes((1 << 40).to_bytes(8, "little") + b"{" + bytes(100))
    with pytest.raises(RequestError, match="a head of"):
        read_file(tmp_path / "y")
