"""Checkpoints damaged at random: each is refused in one sentence or read right, within a bounded time and memory.

``CNCLIP_FT_HOSTILE=N`` loads N of each kind (default 40).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch

from cnclip_ft.models.checkpoints import load, save_checkpoint
from cnclip_ft.models.formats.torch_files import _DTYPES
from data_tools.errors import UserError
from tests.models.helpers import Bomb, official, small, tensors

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("CNCLIP_FT_HOSTILE", "40"))
SECONDS, MEMORY = 6, 600 << 20
VALUES = [
    None,
    -1,
    0,
    7,
    2**70,
    "64",
    "x",
    [1],
    {},
    {"a": 1},
    1.5,
    float("nan"),
    float("inf"),
    True,
    "a" * 10_000,
    [[[]]],
    "../x",
    "os:system",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = small()
    save_checkpoint(model, folder / "ours", info={})
    shutil.copytree(folder / "ours", folder / "theirs")
    (folder / "theirs" / "cnclip_ft.json").unlink()
    state = {name: t.half() for name, t in official(model).items()}
    whole = {"epoch": 1, "args": argparse.Namespace(a=1), "lr": np.float64(0.1), "state_dict": state, "name": "x"}
    torch.save(whole, folder / "zip.pt")
    torch.save(whole, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder


def try_to_load(path, expected):
    """True where it was read (and then rightly); False where it was refused in words."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = load(path)
    except UserError as error:
        assert 0 < len(str(error)) < 2000 and not isinstance(error.__cause__, MemoryError)
        return False
    finally:
        assert time.perf_counter() - begun < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    found = tensors(model)
    assert found.keys() == expected.keys() and all(found[name].shape == expected[name].shape for name in found)
    return True


def spoil(data, draw, head=None):
    """Some bytes changed, cut out, put in, or said twice."""
    data, reach = bytearray(data), min(len(data), head or len(data))
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, size = draw.randrange(reach), draw.choice((1, 1, 2, 4, 9, 60))
        match draw.randrange(4):
            case 0:
                data[at : at + size] = draw.randbytes(size)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = draw.randbytes(size)
            case _:
                data[at:at] = data[at : at + size] * draw.choice((1, 3, 50))
    return bytes(data)


@pytest.mark.parametrize("kind", ["zip.pt", "old.pt", "ours/model.safetensors"])
def test_files_of_weights_with_damaged_heads(good, tmp_path, kind):
    draw, expected = random.Random(kind), tensors(small())
    source = (good / kind).read_bytes()
    place = tmp_path / "x.pt"
    if "/" in kind:
        shutil.copytree(good / "ours", tmp_path / "ours")
        place = tmp_path / kind
    refused = 0
    for _ in range(COUNT):
        if kind == "zip.pt":  # the pickle inside, and now and then the archive itself
            with zipfile.ZipFile(good / kind) as archive, zipfile.ZipFile(place, "w") as made:
                for info in archive.infolist():
                    content = archive.read(info)
                    made.writestr(
                        info.filename, spoil(content, draw) if info.filename.endswith("data.pkl") else content
                    )
            if draw.random() < 0.3:
                data = place.read_bytes()
                place.write_bytes(data[:-3000] + spoil(data[-3000:], draw))
        else:
            place.write_bytes(spoil(source, draw, head=9000))
        refused += not try_to_load(place.parent if "/" in kind else place, expected)
    assert refused > COUNT // 3


def test_descriptions_with_any_value_anywhere(good, tmp_path):
    draw, expected, refused = random.Random(1), tensors(small()), 0
    names = [
        ("ours", "cnclip_ft.json"),
        *(
            ("theirs", name)
            for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")
        ),
    ]
    for number in range(COUNT * 3):
        kind, name = names[number % len(names)]
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(good / kind, tmp_path / "x")
        content = json.loads((tmp_path / "x" / name).read_text(encoding="utf-8"))
        for _ in range(draw.choice((1, 1, 3))):
            place = content
            while place:
                key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
                if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
                    place = place[key]
                    continue
                if isinstance(place, dict) and draw.random() < 0.2:
                    del place[key]
                else:
                    place[key] = draw.choice(VALUES)
                break
        (tmp_path / "x" / name).write_text(json.dumps(content), encoding="utf-8")
        refused += not try_to_load(tmp_path / "x", expected)
    assert refused > COUNT // 2


def test_pickles_of_anything(tmp_path):
    """Pickles of random instructions and of random objects, in every wrapping."""
    draw = random.Random(2)
    codes = [
        code[0]
        for code in (getattr(pickle, name) for name in pickle.__all__ if name.isupper())
        if isinstance(code, bytes)
    ]
    for number in range(COUNT * 3):
        if number % 3 == 0:

            def value(depth=0):
                pick = draw.randrange(8 if depth < 5 else 4)
                made = [
                    None,
                    draw.randrange(2**70),
                    "x" * draw.randrange(99),
                    torch.float16,
                    Bomb(tmp_path / "trace"),
                    torch.zeros(draw.randrange(4), 3),
                    draw.choice(list(_DTYPES.values())),
                    1.5,
                ]
                if pick < 6:
                    return made[pick]
                return {draw.choice(["a", "state_dict", "model", 5, (1, 2)]): value(depth + 1) for _ in range(3)}

            torch.save({"state_dict": value(), "b": value()}, tmp_path / "x.pt")
        else:
            body = (
                b"\x80\x02"
                + b"".join(bytes([draw.choice(codes)]) + draw.randbytes(draw.choice((0, 0, 1, 4))) for _ in range(300))
                + b"."
            )
            if number % 3 == 1:
                (tmp_path / "x.pt").write_bytes(body)
            else:
                with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
                    archive.writestr("x/data.pkl", body)
                    if draw.random() < 0.5:
                        archive.writestr("x/constants.pkl", b"\x80\x02).")
        assert not try_to_load(tmp_path / "x.pt", {})
    assert not (tmp_path / "trace").exists()
