"""Large safetensors files: read in shares by several threads, and ahead of who asks for them."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cnclip_ft.models.formats import files
from cnclip_ft.models.formats.files import read_ahead, read_file, read_folder
from data_tools.errors import RequestError


@pytest.fixture(params=["many threads", "no preadv"])
def shares(request, monkeypatch):
    """Small files read as large ones are: in shares of several pieces, or from one place on."""
    monkeypatch.setattr(files, "_HANDS", 3)
    monkeypatch.setattr(files, "_SHARE", 100)
    monkeypatch.setattr(files, "_PIECE", 64)
    if request.param == "no preadv":
        monkeypatch.delattr(os, "preadv", raising=False)


def test_large_tensors_are_read_in_shares(tmp_path, shares):
    draw = np.random.default_rng(0)
    state = {f"{n}": torch.from_numpy(draw.normal(size=n).astype("f4")) for n in (0, 1, 24, 25, 26, 75, 76, 1001)}
    state |= {"half": torch.arange(500.0).half(), "count": torch.arange(333)}
    save_file(state, tmp_path / "model.safetensors")
    for ahead in (False, True):
        with read_ahead(tmp_path if ahead else tmp_path / "none", torch.float32):
            read = read_folder(tmp_path).tensors
        assert read.keys() == state.keys()
        for name, tensor in state.items():
            expected = tensor.float() if tensor.is_floating_point() else tensor
            assert torch.equal(read[name], expected) and read[name].dtype == expected.dtype, name


@pytest.mark.parametrize("had", [0, 1])
def test_where_no_thread_is_to_be_had_it_is_read_without(tmp_path, monkeypatch, had):
    """At the machine's limit of processes, or while Python ends: none at all, or one and no further."""
    monkeypatch.setattr(files, "_HANDS", 4)
    monkeypatch.setattr(files, "_SHARE", 100)
    state = {"a": torch.arange(5000.0), "b": torch.arange(7.0)}
    save_file(state, tmp_path / "model.safetensors")
    submit, asked = files.ThreadPoolExecutor.submit, []

    def limited(self, *args):
        asked.append(args)
        if len(asked) > had:
            raise RuntimeError("can't start new thread")
        return submit(self, *args)

    monkeypatch.setattr(files.ThreadPoolExecutor, "submit", limited)
    with read_ahead(tmp_path, torch.float32):
        read = read_folder(tmp_path).tensors
    assert len(asked) > had and all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_a_file_that_is_cut_while_it_is_read(tmp_path, shares, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, path)
    checked = files.safe_open

    def cut(*args):
        found = checked(*args)
        os.truncate(path, path.stat().st_size - 10)
        return found

    monkeypatch.setattr(files, "safe_open", cut)
    with pytest.raises(RequestError, match="model.safetensors: torn: it ends within its tensors"):
        read_file(path)


def test_what_was_read_ahead_is_given_once(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with read_ahead(tmp_path, torch.float32):
        assert read_file(path, torch.bfloat16).tensors["a"].dtype == torch.bfloat16  # not the one that was begun
        begun = files._ahead.get()
        first, second = read_file(path).tensors["a"], read_file(path).tensors["a"]
    assert first is begun.content.result().tensors["a"]
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    save_file({"a": torch.zeros(1000)}, path)
    assert read_file(path).tensors["a"].sum() == 0  # nothing is kept behind the end


def test_a_damaged_file_is_told_where_it_is_asked_for(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with read_ahead(tmp_path, torch.float32):
        pass  # another reason to refuse the folder comes first
    with read_ahead(tmp_path, torch.float32):
        with pytest.raises(RequestError) as ahead:
            read_file(path)
    with pytest.raises(RequestError) as alone:
        read_file(path)
    assert str(ahead.value) == str(alone.value)


def test_what_is_refused_is_not_read_on(tmp_path, shares, monkeypatch):
    save_file({"a": torch.ones(100_000)}, tmp_path / "model.safetensors")
    asked = []
    real = files._fill_part
    monkeypatch.setattr(files, "_fill_part", lambda *args: (asked.append(args[3]), real(*args)))
    with pytest.raises(KeyError):
        with read_ahead(tmp_path, torch.float32):
            begun = files._ahead.get()
            while not asked:
                time.sleep(0.001)
            raise KeyError  # the configuration is refused
    assert asked[0].is_set()
    assert begun.content.done() and files._ahead.get() is None


def test_reading_ends_when_it_is_not_wanted(tmp_path, shares):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    hands = files._Hands(2)
    hands.unwanted.set()
    with pytest.raises(RequestError, match="not wanted any more"):
        files._read_file(tmp_path / "model.safetensors", torch.float32, hands)
