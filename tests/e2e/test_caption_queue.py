"""A captioning in the queue: the real process with a tiny random captioner, and a runner of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lora_diffusion.captioning.proposals import Proposals, proposals_file
from lora_diffusion.config_captions import CaptionOrder
from lora_diffusion.jobs.device_lock import device_lock
from lora_diffusion.jobs.queue import Queue, QueueError
from lora_diffusion.runs import RunFolder
from tests.captioners import save_tiny_blip
from tests.queues import real_queue, wait_for, wait_until

pytestmark = pytest.mark.slow

NUM_PICTURES = 5


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """A workspace with a captioner and five pictures, of which the first has a caption."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_tiny_blip(tmp_path / "models" / "blip")
    folder = tmp_path / "data" / "shapes"
    folder.mkdir(parents=True)
    for number in range(NUM_PICTURES):
        Image.new("RGB", (40, 40), (number * 50, 90, 200)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("by hand\n")
    with real_queue(tmp_path) as queue:
        yield queue


def order(**options: object) -> CaptionOrder:
    values = {"folder": "data/shapes", "captioner": "models/blip", "prefix": "sks", "max_tokens": 4, **options}
    return CaptionOrder.of(**values)


def captions(queue: Queue) -> dict[str, str]:
    return {path.name: path.read_text() for path in (queue.workspace.datasets / "shapes").glob("*.txt")}


def test_a_captioning_waits_for_the_device_is_stopped_there_and_goes_on_when_it_is_asked_to(queue: Queue) -> None:
    with device_lock(queue.workspace.lock("cpu"), "the training of neon"):
        job = queue.add_captions(order(write="missing", overwrite=True))
        log = RunFolder(job.run).log
        wait_for(lambda: log.exists() and "waiting for the device (used by the training of neon" in log.read_text(), 90)
        assert (queue.job(job.id).status, captions(queue)) == ("starting", {"0.txt": "by hand\n"})
        queue.stop(job.id)
        wait_until(queue, job.id, "stopped")
    queue.retry(job.id)
    job = wait_until(queue, job.id, "finished")
    made = Proposals.read(proposals_file(job.run)).made
    written = captions(queue)

    assert (job.step, job.steps, job.kind) == (NUM_PICTURES, NUM_PICTURES, "caption")
    assert made.keys() == {f"{number}.png" for number in range(NUM_PICTURES)}
    assert written.pop("0.txt") == "by hand\n", "it has a caption, so the new one is only proposed"
    assert written == {f"{number}.txt": f"{made[f'{number}.png'].caption}\n" for number in range(1, NUM_PICTURES)}
    with pytest.raises(QueueError, match="no training"):
        queue.resume(job.id)


def test_one_that_is_killed_or_fails_tells_why(queue: Queue) -> None:
    with device_lock(queue.workspace.lock("cpu"), "a test"):
        killed = queue.add_captions(order())
        wait_for(lambda: RunFolder(killed.run).log.exists() and "waiting" in RunFolder(killed.run).log.read_text(), 90)
        state = RunFolder(killed.run).read_state()
        assert state is not None
        psutil.Process(state.pid).kill()
        wait_until(queue, killed.id, "interrupted")
        wait_for(lambda: "The captioning process was ended by signal 9" in str(queue.job(killed.id).error))
    failed = queue.add_captions(order(captioner="models/nothing"))

    assert "models/nothing: there is no such folder" in str(wait_until(queue, failed.id, "failed").error)
    assert captions(queue) == {"0.txt": "by hand\n"}
