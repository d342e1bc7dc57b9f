"""A queue with a fake trainer, for tests: a workspace, its runner in this process or in another one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.launch import COMMANDS
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.jobs.runner import Runner
from lora_diffusion.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def fake_command(config: Path, resume: bool) -> list[str]:
    return [sys.executable, str(FAKE_TRAINER), str(config), *(["--resume"] if resume else [])]


def toml(name: str = "ink", *, steps: int = 10, how: str = "0.01", **run: str) -> str:
    keys = "".join(f'{key} = "{value}"\n' for key, value in run.items())
    run_table = f'[run]\nname = "{name}"\nsteps = {steps}\n{keys}'
    return f'# my run\n{run_table}[model]\npath = "base"\n[[dataset]]\npath = "{how}"\n'


def wait_for(is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@contextmanager
def real_queue(root: Path) -> Iterator[Queue]:
    """A queue whose runner and trainings are the real processes. What still runs at the end is killed."""
    try:
        yield Queue(Workspace(root))
    finally:
        kill_runners(root)
        kill_all(root)


def kill_runners(root: Path) -> int:
    """Kills the real runners of a workspace, whoever started them; returns how many there were."""
    num_killed = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # gone, a zombie without a command line, or somebody else's
            words = process.cmdline()
            if "lora_diffusion.jobs.runner" in words and str(root) in words:
                process.kill()
                process.wait(10)
                num_killed += 1
    return num_killed


def wait_until(queue: Queue, id: int, *statuses: str) -> Job:
    """Until a job of a real queue is in one of these."""

    def is_so() -> bool:
        job = queue.job(id)
        assert job.status in (*statuses, "queued", *ACTIVE), job.error
        return job.status in statuses

    wait_for(is_so, 240)
    return queue.job(id)


@dataclass
class Bench:
    """A workspace with a runner that works when a test lets it."""

    queue: Queue
    runner: Runner

    def work_until(self, id: int, *statuses: str, timeout_s: float = 30.0) -> Job:
        def is_so() -> bool:
            self.runner.turn()
            return self.queue.job(id).status in statuses

        wait_for(is_so, timeout_s)
        return self.queue.job(id)

    def work_until_step(self, id: int, step: int) -> Job:
        def is_so() -> bool:
            self.runner.turn()
            job = self.queue.job(id)
            return job.status == "running" and job.step >= step

        wait_for(is_so)
        return self.queue.job(id)

    def process(self, id: int) -> psutil.Process:
        """The training process of a job that runs."""
        from lora_diffusion.runs import RunFolder

        state = RunFolder(self.queue.job(id).run).read_state()
        assert state is not None
        return psutil.Process(state.pid)


@contextmanager
def bench(root: Path, **options: float) -> Iterator[Bench]:
    """What still runs at the end is killed."""
    workspace = Workspace(root)
    runner = Runner(workspace, commands=COMMANDS | {"train": fake_command}, poll_s=0.02, **options)  # pyright: ignore[reportArgumentType]
    made = Bench(Queue(workspace, start_runner=lambda _: None), runner)
    try:
        yield made
    finally:
        for job in made.queue.jobs():
            if job.status in ACTIVE:
                kill_all(root)
        for child in runner._children.values():
            child.wait()


def start_runner(root: Path, *, idle_s: float = 30.0) -> subprocess.Popen[bytes]:
    """A runner process with the fake trainer."""
    script = (
        "from pathlib import Path\nfrom tests.queues import fake_command\n"
        "from lora_diffusion.jobs.runner import Runner\nfrom lora_diffusion.workspace import Workspace\n"
        f"Runner(Workspace(Path({str(root)!r})), {{'train': fake_command}}, poll_s=0.02, idle_s={idle_s}).run()"
    )
    with (root / "runner.txt").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=log, stderr=log)


def trainers(root: Path) -> list[psutil.Process]:
    """Fake trainers of this workspace that are in the process table, zombies among them."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get("LORA_DIFFUSION_JOB", "").startswith(str(root))
        except (psutil.Error, OSError):
            continue
        if is_ours:
            found.append(process)
    return found


def kill_all(root: Path) -> int:
    """Kills every trainer of this workspace; returns how many there were."""
    found = trainers(root)
    for process in found:
        try:
            process.kill()
        except psutil.Error:
            continue
    return len(found)
