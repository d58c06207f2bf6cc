"""The table for a card is made on the CPU with tiny models: every row yields a number."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


@pytest.mark.slow
@requires_official
def test_every_row_of_the_table_yields_a_number():
    """In at most a minute of processor time, most of it one thread's: on a machine with nothing else to do, a minute."""
    before = processor_seconds()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DEVICE": "cpu", "SECONDS": "240"}
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
