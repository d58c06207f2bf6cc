"""The table for a card is made on the CPU with tiny models: every row yields a number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.official import requires_official

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@requires_official
def test_every_row_of_the_table_yields_a_number():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DEVICE": "cpu", "SECONDS": "300"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "step.py"), "cuda"],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=400,
    )
    said = done.stdout
    assert done.returncode == 0 and "failed" not in said and "not measured" not in said, said + done.stderr[-2000:]
    rates = re.findall(r"^tiny +(?:one|two) +(\S.*?) {2,}8 +(\d+\.\d) ", said, re.M)
    assert len(rates) == 14 and all(float(rate) > 0 for _, rate in rates), said
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
