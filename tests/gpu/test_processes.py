"""Queue and engine share a GPU: one process at a time has it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import filelock
import httpx
import pytest
import torch

from lora_diffusion.models.load import load_model
from lora_diffusion.runs import RunFolder
from tests.e2e.test_serve import SERVE, wait_for
from tests.queues import real_queue, wait_until
from tests.random_adapters import random_adapter
from tests.training_runs import ROOT, draw_pictures, write_config

pytestmark = pytest.mark.gpu


def draw(client: httpx.Client, order: dict[str, Any]) -> None:
    url = client.post("/v1/images", json=order).json()["url"]
    while (status := client.get(url).json())["status"] in ("queued", "running"):
        time.sleep(0.05)
    assert status["status"] == "done", status


def test_a_training_of_the_queue_holds_the_gpu_that_an_engine_has_drawn_on_and_lets_go_of_it(
    device: torch.device, tiny_sd1: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapters").mkdir()
    random_adapter(load_model(tiny_sd1), seed=1).write(tmp_path / "adapters" / "ink.safetensors", dtype=torch.float32)
    command = [*SERVE, "--base", str(tiny_sd1), "--adapters", str(tmp_path / "adapters"), "--port", "0"]
    engine = subprocess.Popen(
        [*command, "--workspace", str(tmp_path)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = {"steps": 400 if device.type == "cuda" else 100, "output": "", "device": device.type}
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"), run=run)
    text = config.read_text(encoding="utf-8").replace('output = ""\n', "")
    try:
        with real_queue(tmp_path) as queue:
            record = wait_for(tmp_path / ".lora-diffusion" / "engine.json", engine)
            lock = filelock.FileLock(queue.workspace.lock("cuda-0" if device.type == "cuda" else "cpu"), timeout=0)
            order = {"prompt": "a cat <lora:ink:1>", "steps": 2, "size": [32, 32]}
            with httpx.Client(base_url=f"http://127.0.0.1:{record['port']}", timeout=60) as client:
                draw(client, order)
                job = wait_until(queue, queue.add(text, name="ink").id, "running")
                with pytest.raises(filelock.Timeout):
                    lock.acquire()
                job = wait_until(queue, job.id, "finished")
                assert RunFolder(job.run).adapter(job.name).exists()
                draw(client, order)
                headers = {"Authorization": f"Bearer {record['token']}"}
                assert client.post("/v1/shutdown", headers=headers).status_code == 202
            _, errors = engine.communicate(timeout=60)
            assert engine.returncode == 0, errors
            with lock.acquire():
                assert lock.is_locked
    finally:
        if engine.poll() is None:
            engine.kill()
            engine.communicate()
