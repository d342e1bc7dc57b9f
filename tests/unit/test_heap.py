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
# A tensor is made and freed, then small objects that stay: how many of them lie where it was.
FILL_HOLE = """
import sys
from contextlib import nullcontext

import torch

from lora_diffusion.models.heap import keep_heap, large_blocks_apart

keep_heap()
with large_blocks_apart() if sys.argv[1] == "apart" else nullcontext():
    tensor = torch.ones(10_000_000)
    hole = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    del tensor
    stay = [bytes(2_000) for _ in range(20_000)]  # as much as the tensor: smaller holes are taken first
print(sum(id(small) in hole for small in stay))
"""
PAGES = 40_000_000 // 4096  # of each tensor


glibc_only = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="settings of glibc"
)


def run(program: str, how: str) -> list[int]:
    command = [sys.executable, "-c", program, how]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(value) for value in printed.split()]


def count(how: str) -> tuple[int, int]:
    """How often ten new tensors were given new pages, and how many pages go back to the system then."""
    new, returned = run(COUNT_FAULTS, how)
    return new, returned


@glibc_only
def test_new_tensors_take_the_memory_of_freed_ones_until_it_is_given_back() -> None:
    (new, returned), (new_without, _) = count("kept"), count("plain")

    assert new < new_without / 10
    assert returned > 0.9 * PAGES


@glibc_only
def test_what_is_made_to_stay_does_not_take_the_place_of_large_tensors() -> None:
    (apart,), (among,) = run(FILL_HOLE, "apart"), run(FILL_HOLE, "among")

    assert apart == 0 < among
