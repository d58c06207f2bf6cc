"""Tables on the disk: those made in memory, taken up, found hurt, shared; what cannot be is said."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cnclip_ft.data.pair_tables as pair_tables
import cnclip_ft.data.pairs as pairs_module
from cnclip_ft.data.mixture import Mixture, Part
from cnclip_ft.data.pair_tables import Making, TableFolder
from cnclip_ft.data.pairs import PairDataset, build_table
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.models.preprocessing import SquarePicture
from data_tools.errors import DataFault, UserError
from data_tools.store import StoreWriter, open_store
from tests.data.test_images import encoded, picture

ROOT = Path(__file__).resolve().parents[2]
ARRAYS = ("tokens", "starts", "image_keys", "text_keys")


def write(folder, count=100, *, words=False, shift=0, **options):
    """Pictures of two captions, of which some stand twice."""
    with StoreWriter(folder, **options) as writer:
        for number in range(count // 2):
            writer.add_image(f"图 {number}" if words else number, encoded(picture(9, 3 + number % 5), "PNG"))
        for number in range(count):
            said = number - (number % 11 == 1)  # some texts stand on two pictures
            text = f"第 {(said + shift) % 91 // 7 * 7} 只“狗”" if said % 7 == 0 else f"只有一次 {said}"
            image = number % (count // 2)
            writer.add_pair(f"图 {image}" if words else image, said, text, "zh" if said % 3 else None)
        writer.finish()
    return open_store(folder)


@pytest.fixture
def kept(monkeypatch):
    """Tables of any size are kept, in blocks of 40 pairs."""
    monkeypatch.setattr(pairs_module, "KEPT_FROM", 0)
    monkeypatch.setattr(pair_tables, "BLOCK", 40)
    monkeypatch.setattr(Making.__init__, "__defaults__", (40,))


def same(one, other) -> bool:
    told = (one.cut, one.languages, one.spoken, one.spans) == (other.cut, other.languages, other.spoken, other.spans)
    return told and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def made(store, place, **options):
    said: list[str] = []
    return build_table(store, TextTokenizer(context_length=12), place=place, say=said.append, **options), said


@pytest.mark.parametrize("words", [False, True])
def test_a_table_on_the_disk_is_the_one_in_memory(tmp_path, kept, words):
    store = write(tmp_path / "s", words=words)
    memory, _ = made(store, None)
    table, said = made(store, tmp_path / "cache")
    assert same(table, memory) and table.tokens.dtype == np.uint16 and isinstance(table.tokens, np.memmap)
    assert len(said) == 1 and said[0].startswith(f"{store.path}: its table of 100 pairs is made")
    again, said = made(store, tmp_path / "cache")
    assert same(again, memory) and said == []
    assert [again.ids[place] for place in range(50)] == store.image_ids and len(again.ids) == 50
    assert again.ids[40:99] == store.image_ids[40:]
    assert pickle.loads(pickle.dumps(again.ids))[49] == store.image_ids[49]
    one, other = (PairDataset(store, each, SquarePicture(24))[7]["pixels"] for each in (memory, again))
    assert torch.equal(one, other)
    (folder,) = (tmp_path / "cache").iterdir()
    assert {file.suffix for file in folder.iterdir()} <= {".npy", ".json", ".jsonl"}  # nothing of the making is left


def test_a_mixture_has_one(tmp_path, kept):
    mixture = Mixture([Part(write(tmp_path / "a")), Part(write(tmp_path / "b", 60, shift=3), 2.0, "en")])
    memory, _ = made(mixture, None)
    table, _ = made(mixture, tmp_path / "cache")
    assert same(table, memory) and list(table.ids) == list(mixture.image_ids)
    relabelled = Mixture([Part(part.store, part.weight, "zh") for part in mixture.parts])
    assert made(relabelled, tmp_path / "cache")[1] and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_making_that_was_interrupted_goes_on(tmp_path, kept, monkeypatch):
    store, seen = write(tmp_path / "s"), []
    block = Making.block

    def failing(self, number):
        seen.append(number)
        if number == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return block(self, number)

    monkeypatch.setattr(Making, "block", failing)
    with pytest.raises(KeyboardInterrupt):
        made(store, tmp_path / "cache")
    table, said = made(store, tmp_path / "cache")
    assert seen == [0, 1, 1, 2] and len(said) == 1
    assert same(table, made(store, None)[0])


def test_what_an_older_version_left_unfinished_is_not_taken_up(tmp_path, kept):
    """Its blocks lay in a folder of another name, and held other hashes."""
    store = write(tmp_path / "s")
    memory, _ = made(store, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "table.json").unlink()
    (folder / "blocks").mkdir()
    (folder / "blocks" / "block-000000.npz").write_bytes(b"older")
    assert same(made(store, tmp_path / "cache")[0], memory) and not (folder / "blocks").exists()


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_hurt_table_is_made_anew(tmp_path, kept, how):
    store = write(tmp_path / "s")
    memory, _ = made(store, None)
    made(store, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("tokens.npy", "ids.npy", "table.json"):
        content = bytearray((folder / name).read_bytes())
        if how == "gone":
            (folder / name).unlink()
        else:
            content[len(content) // 2] ^= 0x80
            (folder / name).write_bytes(content[: len(content) // 2] if how == "cut" else content)
        table, said = made(store, tmp_path / "cache")
        words = "is made, once" if (how, name) == ("gone", "table.json") else f"{name} is damaged"
        assert len(said) == 1 and words in said[0]
        assert same(table, memory)


def test_another_store_or_tokenizer_has_another(tmp_path, kept):
    made(write(tmp_path / "s"), tmp_path / "cache")
    store = write(tmp_path / "s", shift=1, overwrite=True)
    table, said = made(store, tmp_path / "cache")
    assert said and same(table, made(store, None)[0])
    build_table(store, TextTokenizer(context_length=13), place=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_where_nothing_can_be_written(tmp_path, kept):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*data.table_cache=FOLDER"):
        made(write(tmp_path / "s"), tmp_path / "file")


def test_few_pairs_leave_no_files(tmp_path):
    made(write(tmp_path / "s"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_pair_without_its_picture_is_named(tmp_path, monkeypatch):
    store = write(tmp_path / "s")
    monkeypatch.setattr(type(store), "image_ids", [*range(10)])
    with pytest.raises(DataFault, match="names image 10, which the store does not hold"):
        made(store, None)


def test_a_pair_of_a_mixture_without_its_picture_is_named(tmp_path, monkeypatch):
    one, other = write(tmp_path / "s"), write(tmp_path / "t", shift=3)
    read = other.fields
    monkeypatch.setattr(
        other, "fields", lambda *run: [(999 if text == 7 else image, text, *more) for image, text, *more in read(*run)]
    )
    with pytest.raises(DataFault, match="t: text 7 names image 999, which the store does not hold"):
        made(Mixture([Part(one), Part(other)]), None)


@pytest.mark.parametrize("when", ["block", "about", "keys"])
def test_another_run_that_is_quicker(tmp_path, monkeypatch, kept, when):
    """It takes away the blocks of both while this one is at work: no error, the same table, nothing left over."""
    memory = made(write(tmp_path / "s", words=True), None)[0]
    work, others = getattr(Making, when), []

    def slow(self, *given):
        if not others:
            others.append(None)
            others[0] = made(open_store(tmp_path / "s"), tmp_path / "cache")[0]
        return work(self, *given)

    monkeypatch.setattr(Making, when, slow)
    table, _ = made(open_store(tmp_path / "s"), tmp_path / "cache")
    assert (
        same(table, memory)
        and same(others[0], memory)
        and list(table.ids) == list(open_store(tmp_path / "s").image_ids)
    )
    (folder,) = (tmp_path / "cache").iterdir()
    assert not any(path.is_dir() or "writing" in path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "hurt", [lambda told: told[: len(told) // 2], lambda told: b"", lambda told: told[:300] + b"??" + told[302:]]
)
def test_a_damaged_block_is_made_anew(tmp_path, kept, hurt):
    store = write(tmp_path / "s")
    folder = TableFolder(tmp_path / "cache", Making(store, TextTokenizer(context_length=12)), torch.device("cpu"))
    folder.blocks.fill(folder.device)
    block = folder.blocks.path(1)
    block.write_bytes(hurt(block.read_bytes()))
    assert same(made(store, tmp_path / "cache")[0], made(store, None)[0])


MAKE = """
import sys
from pathlib import Path
import cnclip_ft.data.pair_tables as pair_tables, cnclip_ft.data.pairs as pairs
from cnclip_ft.collectives import rank
from cnclip_ft.models.families.chinese_clip.wordpiece import TextTokenizer
from cnclip_ft.data.mixture import Mixture, Part
from data_tools.store import open_store
import torch.distributed as dist, os
if "RANK" in os.environ:
    dist.init_process_group("gloo")
pairs.KEPT_FROM, pair_tables.BLOCK = 0, 40
pair_tables.Making.__init__.__defaults__ = (40,)
block = pair_tables.Making.block
def told(self, number):
    print(f"{rank()} {number}\\n", end="", flush=True)
    return block(self, number)
pair_tables.Making.block = told
stores = [open_store(Path(place)) for place in sys.argv[1].split(",")]
store = stores[0] if len(stores) == 1 else Mixture([Part(each) for each in stores])
table = pairs.build_table(store, TextTokenizer(context_length=12), place=Path(sys.argv[2]))
print(f"done {len(table)}\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_processes_share_the_work(tmp_path, kept, several):
    """A table of one process, of two and of four: the same bytes."""
    store: Any = write(tmp_path / "s", 200, words=True)
    places, blocks = str(tmp_path / "s"), 5
    if several:
        store, blocks = Mixture([Part(store), Part(write(tmp_path / "t", 120, words=True, shift=3))]), 8
        places += f",{tmp_path / 't'}"
    made(store, tmp_path / "1")
    (tmp_path / "make.py").write_text(MAKE, encoding="utf-8")
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for count in (2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        arguments = [str(tmp_path / "make.py"), places, str(tmp_path / str(count))]
        out = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=200)
        assert out.stdout.count(f"done {len(store)}") == count, out.stderr[-3000:]
        lines = [line.split() for line in out.stdout.splitlines() if line and not line.startswith("done")]
        assert {tuple(map(int, line)) for line in lines} == {(number % count, number) for number in range(blocks)}
    one, two, four = (contents(tmp_path / name) for name in ("1", "2", "4"))
    assert one == two == four and len(one) == 7
    table, said = made(store, tmp_path / "4")
    assert said == [] and same(table, made(store, None)[0])


def contents(cache: Path) -> dict[str, bytes]:
    (folder,) = cache.iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_thirty_kills(tmp_path, kept):
    """At any moment; CNCLIP_FT_KILLS=N tries more."""
    store, script, chance = write(tmp_path / "s", 400), tmp_path / "make.py", random.Random(0)
    script.write_text(MAKE, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path / "s"), str(tmp_path / "cache")]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    expected = made(store, None)[0]
    for _ in range(int(os.environ.get("CNCLIP_FT_KILLS", "30"))):
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # a block has begun, or all had been done
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for told in (tmp_path / "cache").glob("*/table.json"):
            table, said = made(store, tmp_path / "cache")
            assert said == [] and same(table, expected)
            told.unlink()
    assert same(made(store, tmp_path / "cache")[0], expected)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not list(folder.glob(".*"))  # nothing half-written is left
