"""Freed memory: kept for the next tensors while a model computes, given back to the system after loading; garbage."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 2**31 - 1  # as much as mallopt takes
_LARGE_BYTES = 2**30


def keep_heap() -> None:
    """Let the C library keep up to 2 GB of freed memory for the next tensors; Linux with glibc only.

    By itself it gives memory back as soon as some 10 MB are free, and blocks of 32 MB always. The system hands the next
    tensor new pages, clearing each: adding a number to 42 MB then takes 50 ms in place of 8, encoding 16 pictures of
    256 px with SD's VAE 56 s in place of 43. A training of SD 1.5 holds 1 % more at most.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory, scattered between what is in use; Linux with glibc only.

    Without it the process would hold half as much again as its tensors after weights were replaced one by one.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Keep small objects made inside, which stay, out of the memory of large tensors; after `keep_heap`.

    Where one lies in what a large tensor has left, the next tensor of that size does not fit there any more: with a
    recorded step of 32 pictures the process held up to 300 MB more. Inside, a tensor of a megabyte or more has pages
    of its own from the system.
    """
    trim_heap()
    if library := _glibc():
        library.mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        keep_heap()


@contextmanager
def uncollected() -> Iterator[None]:
    """Without looking for garbage, where some 100,000 objects are made that stay: it takes half of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _glibc() -> Any | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
