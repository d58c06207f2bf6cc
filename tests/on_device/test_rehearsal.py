"""The table for a card is made on the CPU with tiny models: every row yields a number."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sides import OfficialSide
from benchmarks.official import Side
from tests.official import requires_official

ROOT = Path(__file__).resolve().parents[2]


def processor_seconds() -> float:
    """Of processes that ended, theirs too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("where", ["while it is made", "in a step"])
def test_a_row_that_runs_out_of_time_leaves_no_process_behind(monkeypatch, where):
    """It would take memory and time of the rows that follow."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "REHEARSAL", True)
    monkeypatch.setattr(gpu, "clean", lambda: None)  # takes its time after many tests
    processes = []

    class Endless(OfficialSide):
        def __init__(self) -> None:
            if where == "while it is made":
                time.sleep(60)
            self.process = Side("import sys, time\nfor line in sys.stdin: time.sleep(600)")
            processes.append(self.process.process)

        def step(self) -> float:
            return self.process.ask("go")

    row = gpu.Row("tiny", "two", "one that does not end", lambda _batch: Endless(), 8, 1.0)
    began = time.perf_counter()
    with pytest.raises(gpu.OutOfTime), gpu.limited(1.0):
        gpu.measured(row)
    assert time.perf_counter() - began < 30
    assert len(processes) == (where == "in a step") and all(process.poll() is not None for process in processes)


def test_a_batch_that_does_not_fit_is_said_and_the_next_gets_what_time_is_left(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "REHEARSAL", False)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "clean", lambda: None)
    tried = []

    class Greedy:
        def __init__(self, batch: int) -> None:
            tried.append(batch)
            time.sleep(0.2)
            if batch > 64:
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")

        def step(self, count: int = 1) -> float:
            time.sleep(0.01 * count)
            return 0.01

        def memory(self) -> float:
            return 1.0

        def close(self) -> None:
            pass

    row = gpu.Row("tiny", "one", "one that is greedy", Greedy, 128, 30.0)
    with gpu.limited(30.0):
        assert gpu.measured(row)[0] == 64
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 29.6
    assert tried == [128, 96, 64]
    said = capsys.readouterr().out.splitlines()
    assert [line.split("greedy")[1].split()[:3] for line in said] == [["128", "does", "not"], ["96", "does", "not"]], (
        said
    )
    tried.clear()
    with pytest.raises(gpu.OutOfTime), gpu.limited(0.3):
        gpu.measured(row)
    assert tried in ([128], [128, 96])


def test_all_sides_are_asked_for_the_same_batch_where_it_fits(monkeypatch):
    """On a card of 139 GiB, and on one of 80."""
    monkeypatch.setattr(gpu, "REHEARSAL", False)
    for memory, of_ours, of_theirs in ((139, 4096, 4096), (80, 4096, 2336)):
        card = SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        rows = [row for row in gpu.rows_of(Path("nowhere"), []) if isinstance(row, gpu.Row)]
        first = {row.label.startswith(("ours", "SigLIP")): row.batch for row in rows if row.stage == "one"}
        assert first == {True: of_ours, False: of_theirs}


@pytest.mark.slow
@requires_official
def test_every_row_of_the_table_yields_a_number():
    """In at most a minute of processor time, most of it one thread's: on a machine with nothing else to do, a minute."""
    before = processor_seconds()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # packages may be there alone
    environment = os.environ | {"PYTHONPATH": path, "DEVICE": "cpu", "SECONDS": "240"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "step.py"), "cuda"],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,  # for a busy machine
    )
    said = done.stdout
    assert processor_seconds() - before < 60
    assert done.returncode == 0 and "failed" not in said and "not measured" not in said, said + done.stderr[-2000:]
    rates = re.findall(r"^tiny +(?:one|two) +(\S.*?) {2,}8 +(\d+\.\d) ", said, re.M)
    assert len(rates) == 16 and all(float(rate) > 0 for _, rate in rates), said
    assert {
        "official, fp16",
        "ours, compiled by layers",
        "ours, 8 bits, compiled by layers",
        "ours, max-autotune",
        "transformers",
    } < {name for name, _ in rates}
    assert re.search(r"^top-10.*: \d+\.\d\d s", said, re.M) and re.search(
        r"^pictures encoded +[\d,]+ a second", said, re.M
    )
    assert re.search(r"^profile of ours.*waiting for the loader", said, re.M)
