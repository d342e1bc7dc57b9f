"""What `check` says of memory is what a training takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import ROOT, write_config


@pytest.mark.slow
@pytest.mark.timed  # check looks every 5 ms: where others want the cores, it misses short peaks
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
@pytest.mark.parametrize(("quantise", "batch_size"), [("none", 2), ("nf4", 32)])
def test_the_estimate_is_within_15_percent_of_the_peak(tmp_path: Path, quantise: str, batch_size: int) -> None:
    config = write_config(
        tmp_path / "ink.toml",
        ROOT / "samples" / "base",
        ROOT / "samples" / "ink",
        run={"steps": 4, "batch_size": batch_size},
        model={"quantise": quantise},
        dataset={"resolution": 64},
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lora_diffusion"]
    told = subprocess.run(
        [*command, "check", "--config", str(config), "--json"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    with (tmp_path / "log.txt").open("w") as log:
        training = subprocess.Popen(
            [*command, "train", "--config", str(config)], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(training.pid, 0)

    assert status == 0, (tmp_path / "log.txt").read_text()
    assert json.loads(told.stdout)["memory_bytes"] == pytest.approx(usage.ru_maxrss * 1024, rel=0.15)
