"""What a run has measured stays readable after a crash."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.generation.plots import series
from lora_diffusion.jobs.follow import RunFollower
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import Console, MetricsFile, latest_per_step, read_metrics


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


def test_the_bar_of_a_fast_run_moves_ten_times_a_second_and_ends_at_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Bar:
        def __init__(self) -> None:
            self.shown: list[int] = []

        def update(self, _: object, *, completed: int, description: str) -> None:
            assert "loss 0.5" in description
            self.shown.append(completed)

    seconds = iter(0.01 * step for step in range(100, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    console: Any = Console(steps=200, device=torch.device("cpu"))
    console._bar = bar = Bar()
    for step in range(1, 201):  # a hundred a second
        console.show(step, 0.5, 1e-4, 0.01)

    assert bar.shown[0] == 1 and bar.shown[-1] == 200
    assert 15 <= len(bar.shown) <= 22
