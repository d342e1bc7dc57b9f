"""Stopping a run keeps its work."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from lora_diffusion.runs import RunFolder
from tests.training_runs import draw_pictures, launch, prepare, write_config


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "control", "to all"])
def test_stopped_run_saves_and_exits_with_0(tiny_sd1: Path, tmp_path: Path, how: str) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"steps": 5000, "loader_workers": 2})
    process = launch(config)
    state = tmp_path / "run" / "state.json"
    deadline = time.monotonic() + 120
    while not state.exists() or json.loads(state.read_text()).get("step", 0) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    trainer = psutil.Process(json.loads(state.read_text())["pid"])
    if how == "control":
        (tmp_path / "run" / "control" / "stop").touch()
    elif how == "to all":  # as systemd, Slurm and the queue do
        workers = trainer.children()
        assert len(workers) == 2
        for member in (*workers, trainer):
            member.send_signal(signal.SIGTERM)
    else:
        trainer.send_signal(getattr(signal, how))
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 0, output
    stopped = RunFolder(tmp_path / "run").read_state()
    assert stopped.status == "stopped"
    assert 0 < stopped.step < 5000
    assert (tmp_path / "run" / f"test-{stopped.step:06d}.safetensors").exists()
    assert prepare(config, resume=True).step == stopped.step
