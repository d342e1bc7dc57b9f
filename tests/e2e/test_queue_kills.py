"""Whatever is killed whenever: no run is lost, no status is stuck, no zombie stays, the database is whole."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.runs import RunFolder
from lora_diffusion.workspace import Workspace
from tests.queues import kill_all, kill_runners, real_queue, start_runner, toml, trainers, wait_for
from tests.webui.servers import start_web_server

NUM_KILLS = 50
NUM_JOBS = 6
STEPS = 60


def _start_and_kill_runner(root: Path, queue: Queue, first: int) -> None:
    """What is left: the job `first` at work, others that wait, and nobody to start them."""
    with start_runner(root) as runner:
        wait_for(lambda: queue.job(first).status == "running")
        runner.kill()


@pytest.mark.parametrize("command", [["list"], ["move", "2", "1"]])
def test_a_command_of_the_queue_starts_the_runner_that_was_killed(tmp_path: Path, command: list[str]) -> None:
    with real_queue(tmp_path) as queue:
        first, second = (queue.add(toml(name, steps=300), start=False).id for name in ("first", "second"))
        _start_and_kill_runner(tmp_path, queue, first)
        assert queue.job(first).status == "running"

        result = CliRunner().invoke(app, ["queue", *command, "--root", str(tmp_path)])

        assert result.exit_code == 0
        assert ("was gone: it is started again" in result.stderr) == (command == ["list"])
        wait_for(lambda: queue.job(second).status != "queued")
        assert queue.job(first).status == "finished", "the new runner has found it again"


@pytest.mark.slow
def test_the_queue_goes_on_when_the_web_ui_starts_and_for_as_long_as_it_runs(tmp_path: Path) -> None:
    """Everything is killed, as in a power cut; later the runner alone."""
    with real_queue(tmp_path) as queue:
        first, second, third = (
            queue.add(toml(name, steps=1000), start=False).id for name in ("first", "second", "third")
        )
        _start_and_kill_runner(tmp_path, queue, first)
        kill_all(tmp_path)
        wait_for(lambda: queue.job(first).status == "interrupted")
        assert queue.job(second).status == "queued"

        server = start_web_server(tmp_path)
        try:
            wait_for(lambda: queue.job(second).status != "queued")
            assert (queue.job(first).status, queue.job(third).status) == ("interrupted", "queued")
            assert kill_runners(tmp_path) == 1
            wait_for(lambda: queue.job(third).status != "queued", 60)
        finally:
            server.stop()


def _resume_what_was_interrupted(queue: Queue) -> None:
    for job in queue.jobs():
        if job.status == "interrupted":
            assert job.error is not None and job.error.message
            queue.resume(job.id)


def _zombies() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_runner_and_trainer_can_be_killed_at_any_moment(tmp_path: Path) -> None:
    # Which moments are hit differs from machine to machine; who is killed, and about when, does not.
    chance = random.Random(5)
    queue = Queue(Workspace(tmp_path), start_runner=lambda _: None)
    for _ in range(NUM_JOBS):
        queue.add(toml(steps=STEPS))
    runner: subprocess.Popen[bytes] | None = None
    killed = {"runner": 0, "trainer": 0, "both": 0}
    num_trainers = 0
    try:
        for _ in range(NUM_KILLS):
            if all(job.status == "finished" for job in queue.jobs()):
                queue.add(toml(steps=STEPS))
            if runner is None:
                runner = start_runner(tmp_path)
            time.sleep(chance.uniform(0.0, 0.9))
            who = chance.choice(list(killed))
            if who != "trainer":
                runner.kill()
                runner.wait()
                runner = None
            if who != "runner":
                num_trainers += kill_all(tmp_path)
            killed[who] += 1
            if who == "both":
                wait_for(lambda: not any(job.status in ACTIVE for job in queue.jobs()), 5)
            _resume_what_was_interrupted(queue)
        runner = runner or start_runner(tmp_path)

        def is_done() -> bool:
            _resume_what_was_interrupted(queue)
            return all(job.status == "finished" for job in queue.jobs())

        wait_for(is_done, 60)
        wait_for(lambda: not trainers(tmp_path) and not _zombies(), 5)  # the runner looks twenty times a second
    finally:
        if runner is not None:
            runner.kill()
            runner.wait()
        kill_all(tmp_path)

    assert sum(killed.values()) == NUM_KILLS and min(killed.values()) > 5
    assert num_trainers > 10
    jobs = queue.jobs()
    assert len(jobs) >= NUM_JOBS
    assert {(job.status, job.step) for job in jobs} == {("finished", STEPS)}
    assert all(RunFolder(job.run).adapter("ink").read_bytes() == b"weights" for job in jobs)
    with closing(sqlite3.connect(queue.workspace.queue)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
