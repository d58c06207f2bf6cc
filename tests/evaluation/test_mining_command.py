"""`data mine`: its store, what it refuses, processes that share it, kills."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys

import pytest

from cnclip_ft.evaluation import encoding, mining
from data_tools.errors import RequestError
from data_tools.store import StoreWriter, open_store
from tests.commands.test_data import call
from tests.data_tools.samples import picture
from tests.evaluation import tiny
from tests.training.test_processes import launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.make_checkpoint(tmp_path_factory.mktemp("c") / "best")


def write(folder, layout="plain"):
    """Twenty pictures of two captions; 18 is 0 in other bytes; pair 0 has a negative and a weight, pair 4 a box."""
    beside = {0: {"negatives": ["给定的"], "weight": 2.0}, 4: {"boxes": [[0.1, 0.1, 0.5, 0.5]]}}
    with StoreWriter(folder, layout=layout) as writer:
        for n in range(20):
            data = picture(0, (64, 48), "PNG") if n == 18 else picture(n, (64, 48))
            writer.add_image(n + 1, data, columns={"类目": f"c{n % 2}"})
        for n in range(20):
            writer.add_pair(n + 1, 2 * n, f"第 {n} 张图", "zh", beside.get(2 * n))
            writer.add_pair(n + 1, 2 * n + 1, f"picture number {n}", "en")
        writer.add_lone_text(99, "没有图", "zh")
        writer.finish()
    return folder


def left_behind(folder):
    return [name for name in os.listdir(folder) if name.startswith("cnclip-ft.")]


@pytest.mark.parametrize("layout", ["plain", "official"])
def test_the_command_keeps_what_it_finds_and_loses_nothing(tmp_path, checkpoint, layout) -> None:
    store = write(tmp_path / "s", layout)
    code, said = call("mine", checkpoint, store, "--output", tmp_path / "mined", "--below", "1", "--count", "3")
    assert code == 0 and re.search(r"^all +40 +40 ", said, re.M) and "lend each other no negatives: 2" in said
    assert re.search(r"^\d+: .* \(-?0\.\d{4}\)\n  not: ", said, re.M)
    old, new = open_store(store), open_store(tmp_path / "mined")
    assert list(old.pairs()) == list(new.pairs()) and old.lone_texts == new.lone_texts and new.layout == layout
    assert all(old.image(n) == new.image(n) and old.columns_of(n) == new.columns_of(n) for n in old.image_ids)
    count = new.beside_counts["negatives"]
    assert 0 < count <= 40 and new.beside_counts["weight"] == new.beside_counts["boxes"] == 1
    for number, (pair, beside) in enumerate(new.pairs_and_beside()):
        kept = old.beside(number)
        assert {name: beside[name] for name in kept if name != "negatives"} == {
            k: v for k, v in kept.items() if k != "negatives"
        }
        mined = beside.get("negatives", [])[len(kept.get("negatives", [])) :]
        assert beside.get("negatives", [])[: len(kept.get("negatives", []))] == kept.get("negatives", [])
        assert len(mined) <= 3 and all(("张图" in text) == ("张图" in pair.text) for text in mined)
        assert pair.image_id not in (1, 19) or not {
            "第 0 张图",
            "第 18 张图",
            "picture number 0",
            "picture number 18",
        } & set(mined)
    assert not left_behind(tmp_path)


def test_pictures_that_meet_a_condition_alone(tmp_path, checkpoint) -> None:
    store = write(tmp_path / "s")
    code, said = call(
        "mine", checkpoint, store, "--output", tmp_path / "m", "--below", "1", "--where", "类目=c1", "--by", "text"
    )
    assert code == 0 and re.search(r"^all +40 +20 ", said, re.M)
    asked = {
        pair.image_id
        for pair, beside in open_store(tmp_path / "m").pairs_and_beside()
        if beside.get("negatives", []) not in ([], ["给定的"])
    }
    assert asked and all(image_id % 2 == 0 for image_id in asked)


def test_requests_that_cannot_be_met_are_answered(tmp_path, checkpoint) -> None:
    store, at = write(tmp_path / "s"), ["--output", tmp_path / "m"]
    with StoreWriter(tmp_path / "bare") as writer:
        writer.add_image(1, picture(1))
        writer.add_lone_text(1, "没有图", "zh")
        writer.finish()
    with StoreWriter(tmp_path / "parallel") as writer:
        writer.add_lone_text("1:zh", "一", "zh")
        writer.add_lone_text("1:en", "one", "en")
        writer.finish()
    with StoreWriter(tmp_path / "single") as writer:
        for n in (1, 2):
            writer.add_image(n, picture(n))
            writer.add_pair(n, n, "都一样", "zh")
        writer.finish()
    for given, words in (
        (["mine", checkpoint, tmp_path / "parallel", *at], "holds parallel text, which has no pictures"),
        (["mine", checkpoint, tmp_path / "bare", *at], "no picture has a caption"),
        (["mine", checkpoint, tmp_path / "single", *at], "no pair gets a negative"),
        (["mine", store, checkpoint, *at], "is a store: the checkpoint comes first"),
        (["mine", store, tmp_path / "a b", *at], f"cnclip-ft data mine '{tmp_path}/a b' {store} --output"),
        (["mine", checkpoint, tmp_path / "nowhere", *at], "nowhere"),
        (["mine", tmp_path / "nowhere", store, *at], "nowhere"),
        (["mine", checkpoint, store, "--output", store], "is read here"),
        (["mine", checkpoint, store, *at, "--count", "0"], "--count 0"),
        (["mine", checkpoint, store, *at, "--count", "1001"], "at most the 1,000"),
        (["mine", checkpoint, store, *at, "--below", "1.5"], "--below 1.5"),
        (["mine", checkpoint, store, *at, "--by", "both"], "--by 'both'"),
        (["mine", checkpoint, store, *at, "--where", "颜色=红"], "颜色"),
        (["mine", checkpoint, store, *at, "--where", "类目=无"], "no picture meets"),
        (["mine", checkpoint, store, *at, "--memory", "some"], "memory is"),
    ):
        code, said = call(*given)
        assert code == 2 and words in " ".join(said.split()), (given, said)
        assert "Traceback" not in said and not (tmp_path / "m").exists() and not left_behind(tmp_path), given
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "letter.txt").write_text("mine")
    assert call("mine", checkpoint, store, *at)[0] == 2 and (tmp_path / "m" / "letter.txt").read_text() == "mine"


def test_a_store_that_is_there_is_replaced_when_that_is_said(tmp_path, checkpoint) -> None:
    store, output = write(tmp_path / "s"), tmp_path / "m"
    assert call("mine", checkpoint, store, "--output", output, "--below", "1", "--count", "1")[0] == 0
    code, said = call("mine", checkpoint, store, "--output", output, "--below", "1")
    assert code == 2 and "--overwrite" in said
    assert call("mine", checkpoint, store, "--output", output, "--below", "1", "--count", "5", "--overwrite")[0] == 0
    assert max(len(beside.get("negatives", [])) for _, beside in open_store(output).all_beside()) > 2


def digest(found) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in found.values())).hexdigest()


# Blocks of 8 pairs; says which process walked which.
SHARED = """
import sys
from cnclip_ft.cli import main
from cnclip_ft.collectives import rank
from cnclip_ft.evaluation import mining
from tests.evaluation.test_mining_command import digest

mining._AT_ONCE, search = 8, mining.Walk.search

def told(self, block, *given):
    found = search(self, block, *given)
    print(f"walked {block.number} {rank()}:{digest(found)}\\n", end="", flush=True)
    return found

mining.Walk.search = told
sys.argv[0] = "cnclip-ft"
main()
"""


@pytest.mark.slow
def test_processes_of_a_launcher_mine_one_store(tmp_path, checkpoint, monkeypatch) -> None:
    """No device is named: where there is no card they are processes of a CPU."""
    monkeypatch.setattr(mining, "_AT_ONCE", 8)
    store = write(tmp_path / "s")
    given = [checkpoint, store, "--below", "1", "--count", "3", "--output"]
    assert call("mine", *given, tmp_path / "one")[0] == 0
    out = launch(SHARED, tmp_path, 2, *map(str, ["data", "mine", *given, tmp_path / "two"]))
    one, two = (dict(open_store(tmp_path / name).all_beside()) for name in ("one", "two"))
    assert one == two and one
    # 40 pairs of two languages in blocks of 8: six blocks, in turns, with the bytes that one process finds.
    told = dict(line.split()[1:] for line in out.splitlines() if line.startswith("walked "))
    assert {number: name.partition(":")[0] for number, name in told.items()} == {str(n): str(n % 2) for n in range(6)}
    search, alone = mining.Walk.search, {}

    def searching(self, block, *given):
        found = search(self, block, *given)
        alone[str(block.number)] = digest(found)
        return found

    monkeypatch.setattr(mining.Walk, "search", searching)
    assert call("mine", *given, tmp_path / "three")[0] == 0
    assert {number: name.partition(":")[2] for number, name in told.items()} == alone
    assert not left_behind(tmp_path)


# The command, killed at its n-th call of a function: before it, or behind it.
MINE = """
import os, signal, sys
from cnclip_ft.cli import main
import cnclip_ft.features.folder as folder
from cnclip_ft.evaluation import mining
from cnclip_ft.features.rows import Rows
from data_tools.store import StoreWriter

folder.PART, mining._AT_ONCE = {"image": 6, "text": 9}, 8
name, left, behind = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "behind"
where = {"write": Rows, "mine": mining, "prepare": mining.Walk, "search": mining.Walk, "add_text": StoreWriter, "_take_place": StoreWriter}.get(name, folder.FeatureWriter)
whole = getattr(where, name)

def step(*arguments, **options):
    global left
    left -= 1
    found = whole(*arguments, **options) if left or behind else None
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(where, name, step)
sys.argv[1:] = sys.argv[4:]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
@pytest.mark.parametrize(
    "name, count, where",
    [
        ("write", 2, "behind"),  # a block of pictures
        ("write", 6, "before"),  # one of texts
        ("finish", 1, "before"),
        ("finish", 1, "behind"),
        ("prepare", 1, "behind"),
        ("search", 1, "before"),
        ("search", 4, "behind"),
        ("mine", 1, "behind"),
        ("add_text", 30, "behind"),
        ("_take_place", 1, "before"),
        ("_take_place", 1, "behind"),
    ],
)
def test_killed_anywhere_it_is_whole_or_not_there_and_goes_on(tmp_path, checkpoint, name, count, where) -> None:
    given = [checkpoint, write(tmp_path / "s"), "--below", "1", "--device", "cpu", "--output"]
    assert call("mine", *given, tmp_path / "whole")[0] == 0
    before, output = open_store(tmp_path / "whole").checksum(), tmp_path / "m"
    arguments = [name, str(count), where, "data", "mine", *map(str, [*given, output])]
    killed = subprocess.run([sys.executable, "-c", MINE, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = name == "_take_place" and where == "behind"
    assert output.exists() == there and left_behind(tmp_path)
    assert not there or open_store(output).checksum() == before
    code, said = call("mine", *given, output, *(["--overwrite"] if there else []))
    assert code == 0 and open_store(output).checksum() == before and left_behind(tmp_path) == [], said


def test_what_was_encoded_before_a_stop_is_not_encoded_again(tmp_path, checkpoint, monkeypatch) -> None:
    store, given = write(tmp_path / "s"), ["--below", "1", "--output", tmp_path / "m"]

    def stopped(*_, **__):
        raise RequestError("stopped here")

    def mined(of) -> int:
        encoded = []
        with monkeypatch.context() as patch:
            patch.setattr(encoding, "_images", lambda *given: encoded.append(given) or images(*given))
            assert call("mine", of, store, *given, "--overwrite")[0] == 0
        return len(encoded)

    images = encoding._images
    for of, again in ((checkpoint, 0), (tiny.make_checkpoint(tmp_path / "other", seed=1), 1)):
        with monkeypatch.context() as patch:
            patch.setattr(mining.Walk, "search", stopped)
            assert "stopped here" in call("mine", checkpoint, store, *given, "--overwrite")[1] and left_behind(tmp_path)
        assert mined(of) == again and not left_behind(tmp_path)  # of another checkpoint they are made anew
