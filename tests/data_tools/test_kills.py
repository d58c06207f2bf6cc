"""Builds killed at every kind of moment, then gone on with: the same store as without a kill, and nothing beside it.

CNCLIP_FT_KILLS=5000 makes as many kills instead of 100; CNCLIP_FT_KILLS_SEED draws other moments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_tools.samples import write_official

ROOT = Path(__file__).resolve().parents[2]
KILLS, SEED = int(os.environ.get("CNCLIP_FT_KILLS", "100")), os.environ.get("CNCLIP_FT_KILLS_SEED", "1")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# A child builds and is killed (SIGKILL) at its n-th step that touches the disk: a transaction begun or done, a file
# opened for writing, a rename, a removal, a folder made. Half of the kills hit the going on as well; some of what is
# left is moved by a copy, as a backup does it: new inodes, new times.
_LOOP = """
import os, random, shutil, signal, sys, threading, traceback
from pathlib import Path
from tqdm import tqdm
from data_tools.build import build_split
from data_tools.store import StoreWriter, environments, open_store

environments.BATCH_ITEMS, environments._SYNCHRONOUS = 5, False
os.fsync = lambda _: None
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and stays taken when one is killed
new, old, place, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
random.seed(seed)
at, steps = [0], [0]

def step():
    steps[0] += 1
    if steps[0] == at[0]:
        os.kill(os.getpid(), signal.SIGKILL)

def audit(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate") or event == "open" and arguments[1] not in (None, "r", "rb"):
        if place.parent.name in str(arguments[0]):
            step()

sys.addaudithook(audit)
write = environments.GrowingWriter.write
def stepping(self, *arguments, **named):
    step()
    write(self, *arguments, **named)
    step()
environments.GrowingWriter.write = stepping

add_text = StoreWriter.add_text
def adding(self, text_id, text, image_ids, language=None, **named):
    beside = {"weight": text_id + 0.5, "negatives": [f"not {text_id}"]} if text_id % 3 == 0 else None
    return add_text(self, text_id, text, image_ids, language, **{**named, "beside": beside})
StoreWriter.add_text = adding

def child(kill_at, **options):
    pid = os.fork()
    if pid == 0:
        at[0], steps[0] = kill_at, 0
        code = 1
        try:
            build_split(new, "train", place, progress=False, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"status {status} with {options}"
    return status == 0

def content(path):
    store = open_store(path)
    ids = store.image_ids
    assert len(ids) == len(set(ids)) == store.image_count, "pictures came twice"
    found = {i: store.image(i) for i in ids}, sorted(tuple(map(str, (p.image_id, p.text_id, p.text, b))) for p, b in store.pairs_and_beside())
    assert store.beside_counts["pairs"] == sum(int(row[1]) % 3 == 0 for row in found[1])
    store.close()
    return found

def count(options):
    at[0], steps[0] = 0, 0
    build_split(new, "train", place, progress=False, **options)
    wanted = content(place)
    shutil.rmtree(place)
    return steps[0], wanted

kinds = [{}, {"shard_size": 5}, {"shard_size": 4, "layout": "official"}, {"shard_size": 3, "workers": 2}]
known = [count(options) for options in kinds]
build_split(old, "train", place.parent.parent / "before", progress=False)
before = content(place.parent.parent / "before")
outcomes = {"continued": 0, "old": 0, "new": 0, "moved": 0}
for number in range(kills):
    options, (total, wanted) = kinds[number % len(kinds)], known[number % len(kinds)]
    replacing = number % 8 >= 4  # a store is there already
    shutil.rmtree(place.parent, ignore_errors=True)
    place.parent.mkdir()
    if replacing:
        shutil.copytree(place.parent.parent / "before", place)
    done = child(random.randint(1, total + 10 * replacing), overwrite=replacing, **options)
    for again in range(random.randint(0, 1)):
        done = child(random.randint(1, total), resume=True, overwrite=replacing, **options)
    if replacing:
        found = content(place)
        assert found in (before, wanted), "neither the old store nor the new one"
        outcomes["new" if found == wanted else "old"] += 1
    if random.random() < 0.3:
        shutil.copytree(place.parent, place.parent.with_name("backup"), copy_function=shutil.copyfile)
        shutil.rmtree(place.parent)
        os.rename(place.parent.with_name("backup"), place.parent)
        outcomes["moved"] += 1
    # With a store in the way and nothing begun there is nothing to go on with: the word is given again.
    report = build_split(new, "train", place, resume=True, overwrite=replacing, progress=False, **options)
    assert content(place) == wanted, f"kill {number} of {options}"
    outcomes["continued"] += report.continued > 0
    assert os.listdir(place.parent) == [place.name], os.listdir(place.parent)
print(outcomes)
assert kills < 50 or all(outcomes.values()), outcomes
"""


def _run(tmp_path: Path, kills: int, seed: str) -> None:
    folders = [
        write_official(tmp_path / name, images=images, seed=n) for n, (name, images) in enumerate((("a", 17), ("b", 4)))
    ]
    work = tmp_path / "stores-and-before"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, *map(str, folders), str(work / "under-test" / "store"), str(kills), seed],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60 + kills,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_kills(tmp_path) -> None:
    _run(tmp_path, 24, "0")


@pytest.mark.slow
def test_many_kills(tmp_path) -> None:
    _run(tmp_path, KILLS, SEED)
