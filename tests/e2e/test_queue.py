"""The queue with the real training process and a runner of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lora_diffusion.jobs.device_lock import device_lock
from lora_diffusion.jobs.launch import ensure_runner
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.runs import RunFolder
from tests.queues import real_queue, wait_for, wait_until
from tests.training_runs import draw_pictures, tensor_hash, write_config

STEPS = 120


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums in one order; and two threads on a busy machine are slow
    with real_queue(tmp_path) as queue:
        yield queue


def toml(base: Path, root: Path) -> str:
    config = write_config(root / "run.toml", base, draw_pictures(root / "pictures"), run={"steps": STEPS, "output": ""})
    return config.read_text().replace('output = ""\n', "")


def test_a_run_that_was_paused_gives_the_adapter_of_one_that_was_not(
    tiny_sd1: Path, tmp_path: Path, queue: Queue
) -> None:
    paused = queue.add(toml(tiny_sd1, tmp_path), name="paused").id
    wait_until(queue, paused, "running")
    whole = queue.add(toml(tiny_sd1, tmp_path), name="whole").id
    queue.pause(paused)
    assert 1 <= wait_until(queue, paused, "paused").step < STEPS
    wait_until(queue, whole, "starting", "running")
    queue.resume(paused)
    jobs = [wait_until(queue, id, "finished") for id in (whole, paused)]

    assert [job.step for job in jobs] == [STEPS, STEPS]
    hashes = {tensor_hash(RunFolder(job.run).adapter(job.name)) for job in jobs}
    assert len(hashes) == 1
    assert "resuming at step" in RunFolder(jobs[1].run).log.read_text()


def test_a_run_waits_for_the_device_can_be_stopped_while_it_does_and_tells_what_killed_it(
    tiny_sd1: Path, tmp_path: Path, queue: Queue
) -> None:
    with device_lock(queue.workspace.lock("cpu"), "a test"):
        job = queue.add(toml(tiny_sd1, tmp_path))
        log = RunFolder(job.run).log
        wait_for(lambda: log.exists() and "waiting for the device (used by a test" in log.read_text(), 60)
        assert queue.job(job.id).status == "starting"
        queue.stop(job.id)
        assert wait_until(queue, job.id, "stopped").step == 0
    queue.retry(job.id)
    ensure_runner(queue.workspace)  # once more changes nothing
    wait_until(queue, job.id, "running")
    state = RunFolder(job.run).read_state()
    assert state is not None
    psutil.Process(state.pid).kill()
    assert wait_until(queue, job.id, "interrupted").error is not None
    wait_for(lambda: "signal 9 (SIGKILL) at step" in str(queue.job(job.id).error))  # accelerate tells it a moment later
