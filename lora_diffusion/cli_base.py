"""What all commands share: the application, the options they have in common, and errors as messages."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from lora_diffusion.errors import RunError, UserError

USER_ERROR, RUN_FAILED, INTERRUPTED = 2, 3, 130

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
    """Print a project error as its message and leave with its exit status; a traceback only with `debug`."""
    terminal = logging.StreamHandler()
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    logging.basicConfig(format="%(message)s", handlers=[terminal])
    logging.getLogger("lora_diffusion").setLevel(logging.INFO)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes are about parts of them that we do not use
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        yield
    except (UserError, RunError) as error:
        if debug:
            raise
        _leave(str(error), USER_ERROR if isinstance(error, UserError) else RUN_FAILED)
    except KeyboardInterrupt:
        _leave("Interrupted.", INTERRUPTED)


def _leave(message: str, status: int) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(status)
