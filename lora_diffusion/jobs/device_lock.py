"""Who uses the device: one process at a time holds its lock file and has signed beside it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from lora_diffusion.files import write_json_atomically

logger = logging.getLogger(__name__)

VARIABLE = "LORA_DIFFUSION_DEVICE_LOCK"
"""Environment variable with the lock's path; `{device}` in it stands for "cpu" or "cuda-0"."""
DEVICE = "{device}"

_POLL_S = 0.2
_REMIND_EVERY_S = 60.0


class NoLongerWanted(Exception):
    """Who waited for the device was asked to stop. The message says who has it."""


def lock_from_environment(device: str) -> Path | None:
    """The lock that whoever started this process wants it to hold; None if nobody does."""
    path = os.environ.get(VARIABLE)
    return Path(path.replace(DEVICE, device)) if path else None


@contextmanager
def shared_device(
    type: str, index: int | None, what: str, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold a device of torch as `device_lock` does, if whoever started this process wants that; else nothing."""
    path = lock_from_environment(f"cuda-{index or 0}" if type == "cuda" else type)
    if path is None:
        yield
        return
    with device_lock(path, what, should_stop):
        yield


@contextmanager
def device_lock(path: Path, what: str, should_stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold the device inside the block; wait for it as long as another process does.

    what: who this is, in words for those who wait. The system lets go when the process ends, however it does.
    Raises NoLongerWanted when `should_stop` says so while waiting, which is asked five times a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path, timeout=0)
    next_reminder = 0.0
    while True:
        try:
            held.acquire()
            break
        except filelock.Timeout:
            if should_stop():
                raise NoLongerWanted(holder_of(path)) from None
            if time.monotonic() >= next_reminder:
                logger.info("waiting for the device (used by %s)", holder_of(path))
                next_reminder = time.monotonic() + _REMIND_EVERY_S
            time.sleep(_POLL_S)
    try:
        write_json_atomically(_signature(path), {"pid": os.getpid(), "what": what, "since": time.time()})
        yield
    finally:
        _signature(path).unlink(missing_ok=True)
        held.release()


def holder_of(path: Path) -> str:
    """Who signed beside the lock, in words. True only while the lock is held: a killed process leaves its signature."""
    try:
        signed = json.loads(_signature(path).read_text(encoding="utf-8"))
        return f"{signed['what']}, process {int(signed['pid'])}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _signature(path: Path) -> Path:
    return path.with_name(path.name + ".json")
