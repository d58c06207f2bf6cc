"""Whatever stops a build, the old store or the new one is there, whole; and it can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import build as building
from data_tools.build import build_split
from data_tools.errors import RequestError
from data_tools.store import environments, open_store
from tests.data_tools.samples import content, write_lines, write_official

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def small_batches(monkeypatch) -> None:
    """A transaction every few items, so that small builds have many moments to stop at."""
    monkeypatch.setattr(environments, "BATCH_ITEMS", 4)
    monkeypatch.setattr(environments, "_SYNCHRONOUS", False)


class Stops(KeyboardInterrupt):
    pass


def interrupted(monkeypatch, folder: Path, after: int, error: type[BaseException] = Stops, **options) -> None:
    """A build that is stopped by `error` at item `after`, or at the next one it comes to."""
    take = building._Build._take

    def stopping(self, position, item, data) -> None:
        if position >= after:
            raise error("stop")
        take(self, position, item, data)

    with monkeypatch.context() as patch:
        patch.setattr(building._Build, "_take", stopping)
        with pytest.raises(error):
            build_split(folder, "train", progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"shard_size": 5}, {"workers": 2}, {"layout": "official", "shard_size": 4}])
@pytest.mark.parametrize("after", [0, 1, 7, 13, 20, 44])
def test_a_stopped_build_goes_on_where_it_was(tmp_path, monkeypatch, small_batches, after: int, options) -> None:
    write_official(tmp_path)
    build_split(tmp_path, "train", tmp_path / "straight", progress=False, **options)
    wanted = content(open_store(tmp_path / "straight"))
    for _ in range(2):  # twice: going on can be stopped as well
        interrupted(monkeypatch, tmp_path, after, resume=True, **options)
        assert not (tmp_path / "train").exists()
    report = build_split(tmp_path, "train", resume=True, progress=False, **options)
    assert content(open_store(tmp_path / "train")) == wanted
    assert report.pairs == 36 and report.texts == 36
    assert report.continued > 0 or after < 8
    assert not list(tmp_path.glob("*building*"))


def test_faults_are_neither_lost_nor_told_twice(tmp_path, monkeypatch, small_batches) -> None:
    write_official(tmp_path, images=10)
    for name, every in (("train_imgs.tsv", 4), ("train_texts.jsonl", 3)):
        lines = (tmp_path / name).read_bytes().splitlines()
        lines[1::every] = [b"damaged"] * len(lines[1::every])
        write_lines(tmp_path / name, lines)
    build_split(tmp_path, "train", tmp_path / "straight", on_error="skip", progress=False)
    wanted = [json.loads(line) for line in (tmp_path / "straight" / "faults.jsonl").read_bytes().splitlines()]
    for after in (3, 9, 11, 15):
        interrupted(monkeypatch, tmp_path, after, on_error="skip", resume=True)
    report = build_split(tmp_path, "train", on_error="skip", resume=True, progress=False)
    assert [json.loads(line) for line in (tmp_path / "train" / "faults.jsonl").read_bytes().splitlines()] == wanted
    assert sum(report.faults.values()) == len(wanted) > 10
    assert content(open_store(tmp_path / "train")) == content(open_store(tmp_path / "straight"))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_texts_on_refused_pictures_are_listed_once(tmp_path, monkeypatch, small_batches, batch: int) -> None:
    """A fault of the very item at which a transaction falls due is neither before nor behind it."""
    monkeypatch.setattr(environments, "BATCH_ITEMS", batch)
    write_official(tmp_path, images=6)
    lines = (tmp_path / "train_imgs.tsv").read_bytes().splitlines()
    write_lines(tmp_path / "train_imgs.tsv", [lines[0], *(line[:60] for line in lines[1:5]), lines[5]])
    build_split(tmp_path, "train", tmp_path / "straight", on_error="skip", progress=False)
    for after in range(7, 24, 2):
        interrupted(monkeypatch, tmp_path, after, on_error="skip", resume=True)
    report = build_split(tmp_path, "train", on_error="skip", resume=True, progress=False)
    assert report.left_out == 16 and report.faults == {"bad-base64": 4, "refused-image": 12}
    assert (tmp_path / "train/faults.jsonl").read_bytes() == (tmp_path / "straight/faults.jsonl").read_bytes()


def test_going_on_with_something_else_is_refused(tmp_path, monkeypatch, small_batches) -> None:
    write_official(tmp_path)
    interrupted(monkeypatch, tmp_path, 20)
    with pytest.raises(RequestError, match="layout"):
        build_split(tmp_path, "train", layout="official", resume=True, progress=False)
    write_official(tmp_path, images=13)
    with pytest.raises(RequestError, match=r"other files or settings \(different: files\)"):
        build_split(tmp_path, "train", resume=True, progress=False)
    assert build_split(tmp_path, "train", progress=False).images == 13  # anew


def test_without_continue_it_begins_anew(tmp_path, monkeypatch, small_batches) -> None:
    write_official(tmp_path)
    interrupted(monkeypatch, tmp_path, 20)
    assert build_split(tmp_path, "train", progress=False).continued == 0
    assert build_split(tmp_path, "train", resume=True, progress=False).continued == 0  # nothing to go on with


def test_what_an_older_version_left_is_named_and_stays(tmp_path, capsys) -> None:
    write_official(tmp_path)
    (tmp_path / "train.building/seen").mkdir(parents=True)
    (tmp_path / "train.building/request.json").write_text("{}")
    assert build_split(tmp_path, "train", resume=True, progress=False).images == 12
    assert "train.building looks like an interrupted build" in capsys.readouterr().err
    assert (tmp_path / "train.building/request.json").exists()


def test_stopped_between_finishing_and_taking_its_place(tmp_path, monkeypatch, small_batches) -> None:
    """At every step behind the last item: going on ends with the new store, once."""
    from data_tools import outputs
    from data_tools.store import databases, place, writer

    write_official(tmp_path)
    steps = [
        (databases.Databases, "finish"), (place.Workplace, "finish"), (databases.Database, "seal"), (writer.StoreWriter, "_write_numbers"),
        (writer, "verify"), (place, "swap_in"), (outputs.FolderKind, "clear"),
    ]  # fmt: skip
    for number, (owner, name) in enumerate(steps):
        for before in (True, False):
            target = tmp_path / f"store{number}{before}"
            build_split(write_official(tmp_path / "old", images=3), "train", target, progress=False)
            step = getattr(owner, name)

            def stopping(*arguments, step=step, before=before, name=name, **named):
                if not before:
                    step(*arguments, **named)
                raise Stops

            with monkeypatch.context() as patch, pytest.raises(Stops):
                patch.setattr(owner, name, stopping)
                build_split(tmp_path, "train", target, overwrite=True, progress=False)
            assert open_store(target).image_count in (3, 12)
            report = build_split(tmp_path, "train", target, resume=True, progress=False)
            assert (report.images, report.pairs, report.texts, len(open_store(target))) == (12, 36, 36, 36), (
                name,
                before,
            )
            assert not list(tmp_path.glob("*building*"))


_KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path
from tqdm import tqdm
from data_tools.build import build_split
from data_tools.store import environments, open_store

environments.BATCH_ITEMS, environments._SYNCHRONOUS = 6, False
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and stays taken when one is killed
folders, target = [Path(name) for name in sys.argv[1:3]], Path(sys.argv[3])
began = time.perf_counter()
sums = [build_split(folder, "train", target, overwrite=True, progress=False).store.checksum() for folder in folders]
lasts = (time.perf_counter() - began) / 2
random.seed(7)
stand, found = 1, {"old": 0, "new": 0, "continued": 0}
for attempt in range(50):
    new = 1 - stand
    resume = attempt % 2 == 1  # every other one goes on with what the one before left
    if attempt % 2 == 0 and attempt:
        left = build_split(folders[new], "train", target, overwrite=True, progress=False, resume=True)
        assert open_store(target).checksum() == sums[new]
        found["continued"] += left.continued > 0
        stand, new = new, stand
    child = os.fork()
    if child == 0:
        build_split(folders[new], "train", target, overwrite=True, progress=False, resume=resume)
        os._exit(0)
    time.sleep(random.random() * lasts * 1.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store = open_store(target)
    checksum = store.checksum()
    assert checksum in sums, attempt
    assert len(list(store.pairs())) == len(store) and all(store.image(k) for k in store.image_ids), attempt
    stand = sums.index(checksum)
    found["new" if stand == new else "old"] += 1
print(found)
assert found["old"] > 5
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fifty_kills_leave_a_whole_store_every_time(tmp_path) -> None:
    folders = [write_official(tmp_path / name, images=30, seed=seed) for seed, name in enumerate(("a", "b"))]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, folders), str(tmp_path / "store")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


_FULL = """
import sys
from data_tools.build import build_split
from data_tools.errors import UserError
try:
    build_split(sys.argv[1], "train", sys.argv[2], overwrite=True, progress=False, **(eval(sys.argv[3]) if len(sys.argv) > 3 else {}))
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def _says_full(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "could not be written" in done.stdout and "--continue" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes on this system")
def test_a_disk_that_takes_no_more_keeps_the_old_store(tmp_path) -> None:
    """A limit on file sizes stands in for a full disk: the same call fails in the same place."""
    build_split(write_official(tmp_path / "old", images=3), "train", tmp_path / "store", progress=False)
    before = open_store(tmp_path / "store").checksum()
    write_official(tmp_path / "new", images=300)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{_FULL}"
    arguments = [str(tmp_path / "new"), str(tmp_path / "store")]
    _says_full(
        subprocess.run([sys.executable, "-c", limited, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    )
    assert open_store(tmp_path / "store").checksum() == before
    report = build_split(tmp_path / "new", "train", tmp_path / "store", resume=True, progress=False)
    assert report.images == 300 and open_store(tmp_path / "store").checksum() != before


def test_a_full_tmpfs_keeps_the_old_store(tmp_path) -> None:
    """A real full disk, where a user may mount one in a namespace of their own."""
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("unshare")
        or subprocess.run([*prefix, f"mount -t tmpfs -o size=1m tmpfs {disk}"], capture_output=True).returncode
    ):
        pytest.skip("no mounts allowed here; the limit on file sizes is tested instead")
    write_official(tmp_path / "old", images=3)
    write_official(tmp_path / "new", images=600)
    (tmp_path / "full.py").write_text(_FULL, encoding="utf-8")
    (tmp_path / "look.py").write_text(
        "import sys; from data_tools.store import open_store; s = open_store(sys.argv[1]); print(s.image_count, len(list(s.pairs())))",
        encoding="utf-8",
    )
    run = f"{sys.executable} {tmp_path}"
    script = (
        f"mount -t tmpfs -o size=700k tmpfs {disk}; {run}/full.py {tmp_path}/old {disk}/store; "
        f"{run}/full.py {tmp_path}/new {disk}/store && exit 9; echo rc $?; {run}/look.py {disk}/store; "
        f"mount -o remount,size=20m {disk}; {run}/full.py {tmp_path}/new {disk}/store 'dict(resume=True)'; {run}/look.py {disk}/store"
    )
    done = subprocess.run([*prefix, script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be written" in done.stdout and "rc 1\n3 9\n" in done.stdout and done.stdout.endswith("600 1800\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent differently there")
def test_ctrl_c_is_quiet_and_can_be_continued(tmp_path) -> None:
    write_official(tmp_path, images=40)
    script = (
        # Shells start background jobs with Ctrl-C ignored, and what they start inherits it.
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom data_tools import build\nfrom data_tools.store import environments\nenvironments.BATCH_ITEMS = 6\n"
        "from cnclip_ft.cli import main\ntake = build._Build._take\n"
        "def stopping(self, position, item, data):\n"
        "    if position == 60: os.kill(os.getpid(), signal.SIGINT)\n"
        "    take(self, position, item, data)\n"
        "build._Build._take = stopping\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "data", "build", str(tmp_path), "--splits", "train"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 130
        and "with --continue goes on" in done.stderr
        and "Traceback" not in done.stderr
        and not (tmp_path / "train").exists()
    )
    report = build_split(tmp_path, "train", resume=True, progress=False)
    assert report.continued > 40 and report.pairs == 120


def test_an_unwritable_place_is_said(tmp_path) -> None:
    write_official(tmp_path, images=2)
    (tmp_path / "cnclip-ft.train.building").write_text("in the way", encoding="utf-8")
    with pytest.raises(RequestError, match="this name is needed .* what is there is a file"):
        build_split(tmp_path, "train", progress=False)
