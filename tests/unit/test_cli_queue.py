"""The queue's commands say what happened and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
from typer.testing import CliRunner, Result

from lora_diffusion.cli import app
from lora_diffusion.runs import Failure, RunFolder
from lora_diffusion.workspace import Workspace
from tests.queues import toml


@pytest.fixture(autouse=True)
def someone_elses_runner(tmp_path: Path) -> Iterator[None]:
    """As if a runner lived that does nothing."""
    lock = Workspace(tmp_path).lock("runner")
    lock.parent.mkdir()
    with filelock.FileLock(lock):
        yield


def call(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["queue", *arguments, "--root", str(root)], env={"COLUMNS": "200"})


def listed(root: Path) -> list[tuple[str, str, int | None]]:
    jobs = json.loads(call(root, "list", "--json").stdout)
    return [(job["name"], job["status"], job["position"]) for job in jobs]


def test_runs_are_added_moved_paused_and_cancelled(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(toml())
    added = call(tmp_path, "add", str(config))
    assert added.exit_code == 0
    assert f"job 1: ink is queued at place 1, run folder {tmp_path / 'runs' / 'ink'}" in added.stdout
    for name in ("neon", "third"):
        assert call(tmp_path, "add", str(config), "--set", f"run.name={name}").exit_code == 0
    assert call(tmp_path, "move", "3", "1").exit_code == 0
    assert listed(tmp_path) == [("third", "queued", 1), ("ink", "queued", 2), ("neon", "queued", 3)]
    for command in ("pause 1", "cancel 2", "stop 3", "retry 3"):
        assert call(tmp_path, *command.split()).exit_code == 0

    assert listed(tmp_path) == [("ink", "paused", None), ("neon", "cancelled", None), ("third", "queued", 1)]


def test_a_run_from_a_terminal_is_named_by_its_negative_id(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "mine")
    with run.lock():
        run.config.write_text(toml("mine"))
        run.begin(0, 10)
        run.end("failed", Failure("RunError", "the loss is nan", "lower lr"))
    (job,) = json.loads(call(tmp_path, "list", "--json").stdout)
    assert (job["id"] < 0, job["status"]) == (True, "failed")
    assert call(tmp_path, "resume", str(job["id"])).exit_code == 0

    assert listed(tmp_path) == [("mine", "queued", 1)]


def test_the_table_shows_names_as_they_are_and_what_went_wrong(tmp_path: Path) -> None:
    assert "No runs yet" in call(tmp_path, "list").stdout
    config = tmp_path / "x.toml"
    config.write_text(toml("[red]ink", steps=300))
    call(tmp_path, "add", str(config))
    table = call(tmp_path, "list").stdout

    assert "[red]ink" in table
    assert "queued, 1." in table
    assert "0/300" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pause", "7"), "There is no job 7"),
        (("move", "7", "1"), "There is no job 7"),
        (("add", "no-such.toml"), "there is no such file"),
    ],
)
def test_what_is_wrong_is_told_with_exit_status_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = call(tmp_path, *arguments)

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    result = call(tmp_path / "nowhere", "list")

    assert result.exit_code == 2
    assert "is not a folder" in result.stderr


def test_a_run_folder_that_cannot_be_made_is_told_and_nothing_is_queued(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    config = tmp_path / "x.toml"
    config.write_text(toml())
    result = call(tmp_path, "add", str(config))

    assert result.exit_code == 2
    assert "runs/ink: the run folder cannot be made (" in result.stderr
    assert listed(tmp_path) == []


def test_a_runner_makes_no_workspace_where_none_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["runner", "--root", str(tmp_path / "typo" / "deep")], env={"COLUMNS": "300"})

    assert result.exit_code == 2
    assert "typo/deep is not a folder" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_a_runner_beside_another_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_diffusion.jobs.runner._LOCK_TIMEOUT_S", 0.01)
    result = CliRunner().invoke(app, ["runner", "--root", str(tmp_path)], env={"COLUMNS": "300"})

    assert result.exit_code == 0
    assert "Another runner works here already" in result.stdout
