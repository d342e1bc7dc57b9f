"""What a job's process leaves in its run folder whatever happens to it: its log, and why it ended. No torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from lora_diffusion.errors import RunError, UserError
from lora_diffusion.runs import Failure, RunFolder

logger = logging.getLogger(__name__)

FAULT_HINT = "This is a fault of the program or the machine, not of the config. Run again with --debug."


@contextmanager
def log_file(path: Path, hears: Callable[[logging.LogRecord], bool] = lambda _: True) -> Iterator[None]:
    """Also write to `path` what is logged inside the block, and the error that ends it; of a fault with its trace."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(hears)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:  # the terminal shows it later, when it has left all blocks
        message = f"{type(error).__name__}: {error}"
        is_fault = isinstance(error, Exception) and not isinstance(error, UserError | RunError)
        trace = sys.exc_info() if is_fault else None
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), trace))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def recorded_end(
    run: RunFolder, told: Callable[[BaseException], BaseException], *, resume: bool = False
) -> Iterator[None]:
    """Whatever ends the block early is written to state.json before it goes on its way. Ctrl-C has stopped the run.

    told: the error in words for people, which goes on its way in its place. An input error before a resume changes
    nothing.
    """
    before = run.read_state()
    try:
        yield
    except KeyboardInterrupt:
        _end(run, "stopped")
        raise
    except BaseException as error:
        shown = told(error)
        hint = "" if isinstance(shown, UserError | RunError) else FAULT_HINT
        if not (resume and isinstance(shown, UserError) and run.read_state() == before):
            _end(run, "failed", Failure(type(shown).__name__, str(shown) or type(shown).__name__, hint))
        if shown is not error:
            raise shown from error
        raise


def _end(run: RunFolder, status: Literal["stopped", "failed"], failure: Failure | None = None) -> None:
    """What ended the run is on its way, and an error of the writing must not take its place."""
    try:
        run.end(status, failure)
    except Exception as error:
        logger.warning("%s: it cannot be written there that the run has %s (%s)", run.state_file, status, error)


class _LogFile(logging.FileHandler):
    """A full disk delays lines or costs them. It is no error of the program, nor a reason to end it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()
