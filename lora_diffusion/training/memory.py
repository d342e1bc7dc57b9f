"""How much memory something takes, measured while it runs."""

from __future__ import annotations

import os
import threading
from types import TracebackType

import psutil
import torch

_EVERY_S = 0.005


class PeakMemory:
    """Measures what is in use at most inside `with`: allocated on a GPU, resident of this process on a CPU.

    bytes: the peak, known afterwards. On a CPU a thread looks every 5 ms; what is held for a shorter time is missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._is_over.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident_bytes())

    def _watch(self) -> None:
        while not self._is_over.wait(_EVERY_S):
            self.bytes = max(self.bytes, resident_bytes())


def resident_bytes() -> int:
    return psutil.Process(os.getpid()).memory_info().rss


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may come to use without others having to give way."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + resident_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a process could not get the memory it asked for."""
    # The CPU allocator has no exception class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
