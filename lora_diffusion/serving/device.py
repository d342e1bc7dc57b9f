"""The device belongs to one process at a time: whoever uses it holds its lock file and has signed beside it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from lora_diffusion.files import write_json_atomically

WHAT = "the picture engine"


class DeviceBusy(Exception):
    """Another process holds the device. The message says which."""


class DeviceLock:
    """The lock of one device, taken for each batch. Without a path there is nobody to share with."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = filelock.FileLock(path, timeout=0) if path else None

    @property
    def is_shared(self) -> bool:
        return self._path is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises DeviceBusy at once if another process has it. The system lets go when a process ends."""
        if self._lock is None or self._path is None:
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise DeviceBusy(_holder(_signature(self._path))) from None
        try:
            write_json_atomically(_signature(self._path), {"pid": os.getpid(), "what": WHAT, "since": time.time()})
            yield
        finally:
            _signature(self._path).unlink(missing_ok=True)
            self._lock.release()

    def is_held_by_another(self) -> bool:
        """Looks for a signature first: taking the lock to find out keeps others from it for a moment."""
        if self._lock is None or self._path is None or not _signature(self._path).exists():
            return False
        try:
            with self._lock:
                return False
        except filelock.Timeout:
            return True


def _signature(lock: Path) -> Path:
    return lock.with_name(lock.name + ".json")


def _holder(signature: Path) -> str:
    try:
        signed = json.loads(signature.read_text(encoding="utf-8"))
        return f"{signed['what']}, process {int(signed['pid'])}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"  # it has just taken the lock and not signed yet
