"""Trainer, runner, web UI and engine killed at random moments, while runs train and pictures are drawn."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from lora_diffusion.jobs.queue import Queue
from lora_diffusion.runs import RunFolder
from lora_diffusion.workspace import Workspace
from tests.queues import kill_all, start_runner, toml, trainers, wait_for
from tests.webui.servers import WebServer, free_port, start_web_server
from webui.services.engine import RECORD, STARTED

KILLS = {"trainer": 17, "runner": 15, "ui": 9, "engine": 9}
NUM_JOBS = 4
STEPS = 60
STEP_S = "0.04"


@dataclass
class Stage:
    """Everything that runs, each part started anew where it is gone."""

    root: Path
    port: int = field(default_factory=free_port)
    runner: subprocess.Popen[bytes] | None = None
    server: WebServer | None = None
    _functions: dict[str, int] = field(default_factory=dict[str, int])

    def rise(self) -> None:
        if self.runner is None or self.runner.poll() is not None:
            self.runner = start_runner(self.root)
        if self.server is None:
            self.server = start_web_server(self.root, self.port, starts_runner=False)

    def call(self, name: str, *data: object) -> Any:
        """One of the functions for programs."""
        assert self.server is not None
        with httpx.Client(base_url=self.server.url, timeout=60, trust_env=False) as client:
            if not self._functions:
                config = client.get("/config").json()
                self._functions = {item["api_name"]: item["id"] for item in config["dependencies"]}
            body = {"data": data, "fn_index": self._functions[name], "session_hash": "kills", "event_data": None}
            answer = client.post("/gradio_api/run/predict", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"][0]

    def draw(self, seed: int) -> int:
        return self.call("draw", "models/tiny", "a cat", seed, 20, 64, 64)["number"]

    def processes(self, who: str) -> list[psutil.Process]:
        found = trainers(self.root) if who == "trainer" else engines(self.root)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def kill(self, who: str) -> bool:
        """Whether there was somebody to kill."""
        if who in ("trainer", "engine"):
            return _kill(self.processes(who))
        process = self.runner if who == "runner" else self.server and self.server.started
        assert process is not None
        process.kill()
        process.wait()
        self.runner, self.server = (None, self.server) if who == "runner" else (self.runner, None)
        return True

    def end(self) -> None:
        for who in ("ui", "runner"):
            with suppress(AssertionError):
                self.kill(who)
        _kill(engines(self.root))
        kill_all(self.root)


def engines(root: Path) -> list[psutil.Process]:
    """Engine processes of the workspace, also those that load and those that nobody knows any more."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except (psutil.Error, OSError):
            continue
        if "serve" in words and str(root) in words and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def _kill(processes: list[psutil.Process]) -> bool:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    return bool(processes)


def zombies() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]


@pytest.fixture
def stage(tmp_path: Path, tiny_sd1: Path) -> Iterator[Stage]:
    (tmp_path / "models").mkdir()
    # a link would lead out of the workspace
    subprocess.run(["cp", "-r", str(tiny_sd1), str(tmp_path / "models" / "tiny")], check=True)
    stage = Stage(tmp_path)
    try:
        yield stage
    finally:
        stage.end()


@pytest.mark.slow
def test_any_part_can_be_killed_at_any_moment(stage: Stage) -> None:
    # Which moments are hit differs from machine to machine; who is killed in which order does not.
    chance = random.Random(11)
    queue = Queue(Workspace(stage.root), start_runner=lambda _: None)
    for _ in range(NUM_JOBS):
        queue.add(toml(steps=STEPS, how=STEP_S))
    order = [who for who, number in KILLS.items() for _ in range(number)]
    chance.shuffle(order)
    hits: Counter[str] = Counter()
    for number, who in enumerate(order):
        stage.rise()
        while sum(job.status != "finished" for job in queue.jobs()) < 2:
            queue.add(toml(steps=STEPS, how=STEP_S))
        stage.draw(number)
        if who in ("engine", "trainer"):
            wait_for(lambda who=who: bool(stage.processes(who)), 60)
        time.sleep(chance.uniform(0.0, 1.5))
        wait_for(lambda who=who: stage.kill(who), 60)  # the trainer may just have ended, and the next one comes
        hits[who] += 1
        if who == "ui":
            stage.rise()
            check_what_is_shown(stage, queue)
        resume_what_was_interrupted(queue)
    print(dict(hits))
    assert hits == KILLS and hits.total() == 50
    check_that_all_ends_well(stage, queue)


def check_what_is_shown(stage: Stage, queue: Queue) -> None:
    """A new web UI knows every run, as it is."""

    def is_true() -> bool:  # between the two looks a run may have gone on
        shown = {run["id"]: run["status"] for run in stage.call("list_runs")}
        return shown == {job.run.relative_to(stage.root).as_posix(): job.status for job in queue.jobs()}

    wait_for(is_true, 20)


def resume_what_was_interrupted(queue: Queue) -> None:
    for job in queue.jobs():
        if job.status == "interrupted":
            assert job.error is not None and job.error.message
            queue.resume(job.id)


def check_that_all_ends_well(stage: Stage, queue: Queue) -> None:
    stage.rise()

    def is_trained() -> bool:
        resume_what_was_interrupted(queue)
        return all(job.status == "finished" for job in queue.jobs())

    wait_for(is_trained, 120)
    last = stage.draw(7777)
    wait_for(lambda: stage.call("drawing", last)["phase"] == "done", 180)
    wait_for(lambda: not trainers(stage.root) and not zombies(), 10)
    assert len(engines(stage.root)) == 1, "one that was being started when the web UI was killed is not left behind"
    assert {(job.status, job.step) for job in queue.jobs()} == {("finished", STEPS)}
    assert all(RunFolder(job.run).adapter("ink").read_bytes() == b"weights" for job in queue.jobs())
    pictures = list((stage.root / "pictures").glob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as image:
            image.load()
    for name in (RECORD, STARTED, "library.json"):
        path = stage.root / ".lora-diffusion" / name
        assert not path.exists() or json.loads(path.read_text())
    with closing(sqlite3.connect(queue.workspace.queue)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
