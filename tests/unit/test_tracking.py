"""What a run has measured stays readable after a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_diffusion.generation.plots import series
from lora_diffusion.jobs.follow import RunFollower
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import MetricsFile, latest_per_step, read_metrics


def test_a_line_cut_short_by_a_crash_or_a_full_disk_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"segment": 0, "step": 2, "lo')
    resumed = MetricsFile(path)
    resumed.write({"step": 2, "loss": 0.25})

    with path.open("a") as file:
        file.write('{"segment": 1, "st')  # all for which a full disk had room
    resumed.write({"step": 3, "loss": 0.125})

    assert resumed.segment == 1
    assert [(row["step"], row["loss"]) for row in latest_per_step(read_metrics(path))] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
    ]


def test_what_is_not_finite_is_null_and_every_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": 0.5, "grad_norm": float("nan"), "val_loss": float("inf")})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"segment": 0, "step": 1, "loss": 0.5, "grad_norm": None, "val_loss": None}
    assert series(read_metrics(path), "grad_norm") == ([], [])
    follower = RunFollower(RunFolder(tmp_path))
    assert follower.series("loss").values == [0.5] and follower.series("grad_norm").values == []
