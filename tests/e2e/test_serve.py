"""`lora-diffusion serve` as a process: it starts, draws, and ends when told to."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image

from lora_diffusion.models.load import load_model
from tests.random_adapters import random_adapter

ROOT = Path(__file__).parents[2]
START_S = 240  # importing torch and diffusers on a busy machine
SERVE = (sys.executable, "-c", "from lora_diffusion.cli import main; main()", "serve")


@pytest.fixture(scope="module")
def adapters(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    random_adapter(load_model(tiny_sd1), seed=1).write(folder / "ink.safetensors", dtype=torch.float32)
    return folder


@pytest.fixture
def started(tiny_sd1: Path, adapters: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    command = [*SERVE, "--base", str(tiny_sd1), "--adapters", str(adapters), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--workspace", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process, tmp_path / ".lora-diffusion" / "engine.json"
    if process.poll() is None:
        process.kill()
        process.communicate()


def wait_for(record: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        if record.exists() and record.stat().st_size:
            return json.loads(record.read_text(encoding="utf-8"))
        time.sleep(0.1)
    raise AssertionError("the engine did not start")


def test_it_draws_and_sigterm_ends_it_within_a_step(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, record_file = started
    record = wait_for(record_file, process)
    assert record["pid"] == process.pid
    assert record["process_start"] == pytest.approx(psutil.Process(process.pid).create_time())
    assert record_file.stat().st_mode & 0o777 == 0o600, "it holds the token"
    order: dict[str, Any] = {"prompt": "a cat <lora:ink:1>", "steps": 2, "size": [32, 32]}
    with httpx.Client(base_url=f"http://127.0.0.1:{record['port']}", timeout=60) as client:
        assert client.get("/v1/health").json()["base"] == "tiny-sd1"
        url = client.post("/v1/images", json=order).json()["url"]
        status = client.get(url).json()
        while status["status"] in ("queued", "running"):
            time.sleep(0.05)
            status = client.get(url).json()
        assert status["status"] == "done", status
        assert Image.open(io.BytesIO(client.get(status["images"][0]).content)).size == (32, 32)
        client.post("/v1/images", json=order | {"steps": 200, "count": 64})
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert not record_file.exists()


def test_its_token_ends_it_too(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, record_file = started
    record = wait_for(record_file, process)
    headers = {"Authorization": f"Bearer {record['token']}"}
    assert httpx.post(f"http://127.0.0.1:{record['port']}/v1/shutdown", headers=headers).status_code == 202
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_an_engine_that_may_end_when_idle_ends_in_order(tiny_sd1: Path, adapters: Path, tmp_path: Path) -> None:
    command = [*SERVE, "--base", str(tiny_sd1), "--adapters", str(adapters), "--port", "0"]
    ended = subprocess.run(
        [*command, "--workspace", str(tmp_path), "--end-when-idle", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert "the memory is free" in ended.stderr
    assert not (tmp_path / ".lora-diffusion" / "engine.json").exists()


def test_a_host_for_everyone_is_refused_before_anything_is_loaded(tiny_sd1: Path, adapters: Path) -> None:
    command = [*SERVE, "--base", str(tiny_sd1), "--adapters", str(adapters), "--host", "0.0.0.0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "--token" in ended.stderr
    assert "Traceback" not in ended.stderr
