"""Freed memory is kept while a model computes, and given back when weights have been replaced."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from lora_diffusion.models.heap import keep_heap, trim_heap

if sys.argv[1] == "kept":
    keep_heap()
for _ in range(10):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(10_000_000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
held = int(open("/proc/self/statm").read().split()[1])
trim_heap()
print(after - before, held - int(open("/proc/self/statm").read().split()[1]))
"""
PAGES = 40_000_000 // 4096  # of each tensor


def count(how: str) -> tuple[int, int]:
    """How often ten new tensors were given new pages, and how many pages go back to the system then."""
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    new, returned = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(new), int(returned)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="settings of glibc"
)
def test_new_tensors_take_the_memory_of_freed_ones_until_it_is_given_back() -> None:
    (new, returned), (new_without, _) = count("kept"), count("plain")

    assert new < new_without / 10
    assert returned > 0.9 * PAGES
