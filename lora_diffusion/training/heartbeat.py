"""Signs of life while one step takes minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

_EVERY_S = 30.0  # the loop itself gives signs more often, as soon as it is in step


@contextmanager
def kept_alive(beat: Callable[[], None], every_s: float = _EVERY_S) -> Generator[None]:
    """Inside, a thread calls `beat` every `every_s` seconds. A disk that is full is the main thread's to report."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(every_s):
            with suppress(OSError):
                beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
