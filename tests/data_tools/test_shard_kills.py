"""An index of shards written by processes that are killed at every kind of moment; and tars of anything, which never give a traceback.

CNCLIP_FT_KILLS=500 makes as many kills instead of 30; CNCLIP_FT_KILLS_SEED draws other moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.shards import open_pairs
from tests.data_tools.shard_samples import everything, rows, samples, write_parquet, write_tar

ROOT = Path(__file__).resolve().parents[2]
KILLS, SEED = int(os.environ.get("CNCLIP_FT_KILLS", "30")), int(os.environ.get("CNCLIP_FT_KILLS_SEED", "1"))

# A child makes the index and is killed (SIGKILL) at its n-th step that touches the disk: a file opened for writing, a
# rename, a removal, a folder made. Then another one goes on, to its end or to its own kill.
_LOOP = """
import os, random, shutil, signal, sys, threading
from pathlib import Path
from tqdm import tqdm
from data_tools.shards import open_pairs
from data_tools.shards.index import FOLDER
from tests.data_tools.shard_samples import everything

tqdm.set_lock(threading.RLock())
os.fsync = lambda _: None
place, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
at, steps = [0], [0]

def audit(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or event == "open" and arguments[1] not in (None, "r", "rb"):
        if FOLDER in str(arguments[0]):
            steps[0] += 1
            if steps[0] == at[0]:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)

def child(kill_at):
    pid = os.fork()
    if pid == 0:
        at[0], steps[0], code = kill_at, 0, 1
        try:
            open_pairs(place)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0

wanted = everything(open_pairs(place))
total, left = steps[0], sorted(path.name for path in (place / FOLDER).rglob("*"))
killed = 0
for number in range(kills):
    shutil.rmtree(place / FOLDER)
    done = child(random.randint(1, total))
    for again in range(random.randint(0, 2)):
        done = child(random.randint(1, max(total // 2, 1)))
    killed += not done
    assert everything(open_pairs(place)) == wanted, number
    there = sorted(path.name for path in (place / FOLDER).rglob("*"))
    assert [name for name in there if not name.endswith((".writing", ".indexing", ".joining"))] == left, (there, left)
    assert all((place / FOLDER / name).stat().st_size < 2**20 for name in there if name.endswith(".writing"))
print(total, killed)
assert killed > kills // 4
"""


def _kill(place: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, str(place), str(kills), str(SEED)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120 + 10 * kills,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def place(tmp_path) -> Path:
    for number in range(4):
        write_tar(tmp_path / "t" / f"{number}.tar", samples(number * 3, 3, captions=1 + number % 2))
    return tmp_path / "t"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@needs_fork
def test_a_few_kills(place) -> None:
    _kill(place, 4)


@needs_fork
@pytest.mark.slow
def test_many_kills(place) -> None:
    _kill(place, KILLS)


def _mutated(data: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled, moved: a byte or a block of 512."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        how, at = draw.randint(0, 5), draw.randrange(len(changed))
        block = at // 512 * 512
        if how == 0:
            changed[at] = draw.randrange(256)
        elif how == 1:
            del changed[at:]
            changed = changed or bytearray(b"x")
        elif how == 2:
            changed[block:block] = changed[block : block + 512]
        elif how == 3:
            del changed[block : block + 512]
            changed = changed or bytearray(b"x")
        elif how == 4:  # a header's size, checksum or kind
            changed[block + 100 : block + 160] = bytes(draw.choices(b"01234567 \0LKxg", k=60))[
                : len(changed[block + 100 : block + 160])
            ]
        else:
            changed[block : block + 8] = draw.randbytes(8)
    return bytes(changed)


def _survives(folder: Path, data: bytes, ending: str, number: int) -> None:
    file = folder / f"{number}{ending}"
    file.write_bytes(data)
    try:
        source = open_pairs(file)
        found = everything(source)
        assert len(found["pairs"]) == len(source) and all(type(one) is bytes for one in found["pictures"])
    except UserError as error:
        assert str(error)


def _rounds(folder: Path, rounds: int) -> None:
    draw = random.Random(SEED)
    tar = write_tar(folder / "whole.tar", samples(0, 3, captions=2) + samples(5, 2)).read_bytes()
    table = write_parquet(folder / "whole.parquet", rows(samples(0, 4, captions=2)), row_group_size=2).read_bytes()
    (folder / "m").mkdir()
    for number in range(rounds):
        _survives(folder / "m", _mutated(tar, draw), ".tar", number)
        if number % 4 == 0:
            _survives(folder / "m", _mutated(table, draw), ".parquet", number)


def test_mutated_shards_are_read_or_refused_in_words(tmp_path) -> None:
    _rounds(tmp_path, 25)


@pytest.mark.slow
def test_many_mutated_shards(tmp_path) -> None:
    _rounds(tmp_path, 1500)
