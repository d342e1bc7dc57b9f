"""What goes wrong is told in a line, with an exit status that says whose fault it is; a traceback only with --debug."""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from lora_diffusion.cli import app
from lora_diffusion.cli_base import errors_as_messages
from lora_diffusion.config import PreviewConfig
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.jobs.record import log_file
from lora_diffusion.timesteps import max_denoising_steps


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def told(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and message of a command that ends with this error."""
    with pytest.raises(typer.Exit) as left, errors_as_messages(debug=False):
        raise error
    return left.value.exit_code, capsys.readouterr().err


def system_error(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("x.toml: wrong"), 2, "Error: x.toml: wrong"),
        (RunError("the loss is nan"), 3, "Error: the loss is nan"),
        (KeyboardInterrupt(), 130, "Error: Interrupted."),
        (system_error(errno.EEXIST, "out"), 2, "Error: out: File exists. Choose another name or place."),
        (system_error(errno.EACCES, "/proc/x"), 2, "Error: /proc/x: Permission denied. Change its permissions"),
        (system_error(errno.ENOSPC), 2, "Error: No space left on device. There is no space left: free some"),
        (OSError("no such model on the hub"), 2, "Error: no such model on the hub. Run again with --debug"),
        (RuntimeError("odd shape"), 3, "Error: RuntimeError: odd shape"),
    ],
)
def test_every_error_is_a_message_with_its_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    code, printed = told(error, capsys)

    assert code == status
    assert printed.startswith(message)
    assert "Traceback" not in printed


def test_a_fault_names_debug_which_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Run again with --debug" in told(RuntimeError("odd shape"), capsys)[1]
    for error in (RuntimeError("odd shape"), system_error(errno.EEXIST, "out"), UserError("wrong")):
        with pytest.raises(type(error)), errors_as_messages(debug=True):
            raise error


@pytest.mark.parametrize("ending", [typer.Exit(0), typer.Abort(), BrokenPipeError()])
def test_what_typer_understands_passes_through(ending: BaseException) -> None:
    with pytest.raises(type(ending)) as left, errors_as_messages(debug=False):
        raise ending

    assert left.value is ending


def test_the_log_of_a_run_has_the_trace_of_a_fault_and_only_of_one(tmp_path: Path) -> None:
    def logged(error: Exception) -> str:
        path = tmp_path / f"{type(error).__name__}.txt"
        with pytest.raises(type(error)), log_file(path, lambda record: record.levelno >= logging.ERROR):
            raise error
        return path.read_text(encoding="utf-8")

    assert re.search(
        r"RuntimeError: odd shape\nTraceback .*test_cli_errors.py", logged(RuntimeError("odd shape")), re.S
    )
    assert "Traceback" not in logged(UserError("wrong"))


def test_where_pictures_go_is_checked_before_a_base_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "taken.png"
    file.touch()
    generate = ("generate", "--base", tmp_path / "no-base", "--prompt", "a cat", "--out")
    grid = ("grid", "--base", tmp_path / "no-base", "--prompt", "a cat", "--x", "seed=1,2", "--out")
    (tmp_path / "folder.png").mkdir()

    for arguments, message in (
        ((*generate, file), "taken.png is a file, not a folder. Choose another name."),
        ((*generate, file / "deep" / "er"), "taken.png is a file, not a folder"),
        ((*grid, file / "sheet.png"), "taken.png is a file, not a folder"),
        ((*grid, tmp_path / "folder.png"), "this is a folder. Choose another name."),
        ((*grid, file), "taken.png: there is something of this name already. Choose another name, or add --overwrite."),
    ):
        result = run(*arguments)
        assert (result.exit_code, "no-base" in result.stderr) == (2, False)
        assert message in result.stderr


@pytest.mark.parametrize("command", ["generate", "grid"])
def test_steps_that_no_engine_draws_are_refused_before_anything_is_loaded(command: str, tmp_path: Path) -> None:
    most = PreviewConfig(steps=max_denoising_steps()).steps
    where = ("--out", tmp_path) if command == "generate" else ("--x", "cfg=1,7", "--out", tmp_path / "sheet.png")
    arguments = (command, "--base", tmp_path / "none", "--prompt", "a cat", *where, "--steps")

    refused, tried = run(*arguments, most + 1), run(*arguments, most)
    assert refused.exit_code == 2 and "--steps" in refused.output and str(most) in refused.output
    assert "--steps" not in tried.output and "none" in tried.output
