"""What this machine has and how full it is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

import psutil


@dataclass(frozen=True)
class Machine:
    """memory in bytes: of the GPU if there is one, else of the computer."""

    device: str
    is_gpu: bool
    memory_used: int
    memory_total: int


def read_machine() -> Machine:
    gpu = _gpu_handle()
    if gpu is not None:
        import pynvml  # pyright: ignore[reportMissingImports]

        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            return Machine(_text(pynvml.nvmlDeviceGetName(gpu)), True, int(memory.used), int(memory.total))
        except pynvml.NVMLError:
            pass
    memory = psutil.virtual_memory()
    return Machine(_processor(), False, memory.total - memory.available, memory.total)


@cache
def _gpu_handle() -> object | None:
    """The first NVIDIA GPU. None without one, without its driver, or without the package nvidia-ml-py."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError:
        return None


@cache
def _processor() -> str:
    cores = psutil.cpu_count() or 1
    return f"CPU, {cores} {'core' if cores == 1 else 'cores'}, {platform.machine()}"


def _text(name: str | bytes) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
