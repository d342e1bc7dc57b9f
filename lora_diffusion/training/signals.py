"""Stopping on request: the first signal finishes the step, the second ends at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Those that ask a program to end; Windows has no SIGHUP."""


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGHUP or a `control/stop` file; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals while the block runs, then put the earlier handlers back.

        Outside the main thread signals belong to somebody else and are left alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)  # no handler, no flush: checkpoints are whole at any instant
        self.reason = name
        logger.info("%s: finishing this step, then saving. Press Ctrl-C again to stop at once without saving.", name)
