"""Devices that wait for one another stand in no collective for longer than a look or a piece of work takes."""

from __future__ import annotations

import pickle

import pytest

from tests.training.test_processes import launch

WAITING = """
import pickle, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from cnclip_ft import collectives
from cnclip_ft.collectives import in_rounds, on_first, together

dist.init_process_group("gloo")
rank, cpu, found, longest = dist.get_rank(), torch.device("cpu"), {"done": []}, 0.0
reduce = dist.all_reduce

def timed(*arguments, **options):
    global longest
    began = time.perf_counter()
    reduce(*arguments, **options)
    longest = max(longest, time.perf_counter() - began)

dist.barrier()
dist.all_reduce = timed
on_first(lambda: (time.sleep(3), found["done"].append("written")), cpu)
dist.all_reduce = reduce
found["longest"] = longest

def fail():
    raise OSError(28, "No space left on device")

for name, step in {"error": fail, "after": lambda: None}.items():
    try:
        on_first(step, cpu)
        found[name] = None
    except Exception as error:
        found[name] = (type(error).__name__, str(error))
own = [["a", "b", "c"], [1]][rank]
found["rounds"] = list(in_rounds(own, cpu, lambda: False))
asked = []
found["stopped"] = [asked.append(piece) or piece for piece in in_rounds(own, cpu, lambda: rank == 1 and bool(asked))]
try:
    with together(cpu):
        for piece in in_rounds(own, cpu, lambda: False):
            if piece == 1:
                raise ValueError("piece 1")
    found["broken"] = None
except Exception as error:
    found["broken"] = (type(error).__name__, str(error))
gathered = [None, None]
dist.all_gather_object(gathered, found)
if rank == 0:
    Path(sys.argv[1]).write_bytes(pickle.dumps(gathered))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_others_wait_in_short_looks(tmp_path):
    launch(WAITING, tmp_path, 2, str(tmp_path / "found"))
    first, other = pickle.loads((tmp_path / "found").read_bytes())
    assert first["done"] == ["written"] and other["done"] == []
    assert max(first["longest"], other["longest"]) < 2  # of a work of 3 seconds
    assert first["error"] == ("OSError", "[Errno 28] No space left on device")
    assert other["error"][0] == "FailedElsewhere" and "No space left on device" in other["error"][1]
    assert first["after"] is None and other["after"] is None
    assert first["rounds"] == ["a", "b", "c"] and other["rounds"] == [1]
    assert first["stopped"] == ["a"] and other["stopped"] == [1]
    assert first["broken"][0] == "FailedElsewhere" and other["broken"] == ("ValueError", "piece 1")
