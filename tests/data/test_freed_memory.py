"""Freed memory stays with the process: its next use costs no page faults."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys

import pytest

FRESH = "ctypes.CDLL(None).mallopt(-3, 1 << 20)"  # every block from the kernel
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
COUNT = """
import ctypes, resource
import torch
from cnclip_ft.runtime import keep_activations, keep_pictures
{settle}
size, heap = 24 << 20, ctypes.CDLL(None)
heap.malloc.restype, heap.malloc.argtypes, heap.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():
    block = heap.malloc(size)
    ctypes.memset(block, 1, size)
    heap.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@functools.cache
def faults(settle: str) -> int:
    code = COUNT.format(settle=settle)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["keep_pictures(0)", "keep_activations(torch.device('cpu'))"])
def test_memory_is_used_again(settle):
    assert faults(FRESH) > 100 > 50 > faults(settle)  # 61,440 pages; 120 where the kernel gives large ones unasked


def test_a_gpu_changes_nothing():
    assert faults(f"{FRESH}; keep_activations(torch.device('cuda'))") > 100


@pytest.mark.slow
def test_memory_is_given_back_where_it_is_to_be_saved():
    cpu = "keep_activations(torch.device('cpu'"
    assert faults(f"{cpu}), False); {cpu}))") > 100  # the second call leaves what the first one said
    assert faults(f"{cpu}), False); {cpu}), True)") < 50
