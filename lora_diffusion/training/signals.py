"""Stopping on request: the first signal finishes the step, a second Ctrl-C ends at once."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Those that ask a program to end; Windows has no SIGHUP."""


class StopRequest:
    """Set by SIGINT, SIGTERM, SIGHUP or a `control/stop` file; the loop looks at it between steps.

    wider: one that asks others to stop, too, and counts as this one.
    """

    def __init__(self, wider: StopRequest | None = None) -> None:
        self._reason: str | None = None
        self._wider = wider

    @property
    def reason(self) -> str | None:
        return self._reason or (self._wider.reason if self._wider else None)

    @reason.setter
    def reason(self, reason: str | None) -> None:
        self._reason = reason

    def __bool__(self) -> bool:
        return self.reason is not None

    def listen(self) -> AbstractContextManager[None]:
        """Inside, the first signal sets this. A second Ctrl-C raises KeyboardInterrupt: nothing more is saved."""
        return _handled_by(self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once by a second Ctrl-C")  # checkpoints are whole at any instant
        self.reason = name
        logger.info("%s: finishing this step, then saving. Press Ctrl-C again to stop at once without saving.", name)


def ends_at_once() -> AbstractContextManager[None]:
    """Inside, where nothing is lost by it, every signal raises KeyboardInterrupt, as Ctrl-C does by itself."""
    return _handled_by(_interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals while the block runs, then put the earlier handlers back.

    Outside the main thread signals belong to somebody else and are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)
