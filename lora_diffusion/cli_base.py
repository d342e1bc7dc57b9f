"""What all commands share: the application, the options they have in common, and errors as messages."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from lora_diffusion.errors import RunError, UserError

USER_ERROR, RUN_FAILED, INTERRUPTED = 2, 3, 130

_NO_SPACE = "There is no space left: free some, or choose a place on another disk."
_NOT_ALLOWED = "Change its permissions, or choose another place."
_OTHER_PLACE = "Choose another name or place."
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.EEXIST: _OTHER_PLACE,
    errno.ENOTDIR: _OTHER_PLACE,
    errno.EISDIR: _OTHER_PLACE,
    errno.ENOENT: "Check its spelling.",
    errno.ENAMETOOLONG: _OTHER_PLACE,
}
"""What to do where the system refuses to read or write."""

app = typer.Typer(
    name="lora-diffusion",
    help="Train and use LoRA adapters for Stable Diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")]


@contextmanager
def errors_as_messages(debug: bool) -> Iterator[None]:
    """Print an error as its message and leave with its exit status; a traceback only with `debug`."""
    terminal = logging.StreamHandler()
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    logging.basicConfig(format="%(message)s", handlers=[terminal])
    logging.getLogger("lora_diffusion").setLevel(logging.INFO)
    # diffusers imports bitsandbytes wherever it is installed, which then misses a kernel that is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes are about parts of them that we do not use
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a name it cannot show must not end a command
    try:
        yield
    except (UserError, RunError) as error:
        if debug:
            raise
        _leave(str(error), USER_ERROR if isinstance(error, UserError) else RUN_FAILED)
    except KeyboardInterrupt:
        _leave("Interrupted.", INTERRUPTED)
    except (typer.Exit, typer.Abort, BrokenPipeError):  # what typer makes an exit status of
        raise
    except OSError as error:
        if debug:
            raise
        _leave(_of_the_system(error), USER_ERROR)
    except Exception as error:
        if debug:
            raise
        from lora_diffusion.jobs.record import FAULT_HINT

        _leave(f"{type(error).__name__}: {error}\n{FAULT_HINT}", RUN_FAILED)


def _of_the_system(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    place = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0, "Run again with --debug to see where it happened.")
    return f"{place}{error.strerror or error}. {remedy}"


def _leave(message: str, status: int) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(status)
