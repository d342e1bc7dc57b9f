"""The benchmark's comparison of the fast path with the plain one: it sees what is the same, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity import compare_paths
from benchmarks.pictures import write_pictures
from benchmarks.trainers import Task
from benchmarks.training import check_parity
from benchmarks.training_chart import table
from lora_diffusion.adapters import lora
from tests.training_runs import ROOT

STEPS = 4


@pytest.fixture
def task(tmp_path: Path) -> Task:
    pictures = write_pictures(tmp_path / "pictures", 4, 64)
    return Task(ROOT / "samples" / "base", False, pictures, 64, "fp32", 1, STEPS, tmp_path)


def test_a_benchmark_tells_that_both_paths_learn_the_same(task: Task) -> None:
    parity = check_parity(task, STEPS, threads=1)
    assert (parity["steps"], parity["window"], parity["num_packed"]) == (STEPS, STEPS // 2, 0)
    # float32's rounding, and what AdamW makes of it where a gradient is near 0. Measured: 6e-8, 5e-7 and 1 - 5e-10.
    assert 0 <= parity["loss"] < 1e-5
    assert 0 < parity["grad_norm"] < 1e-4
    assert 0.9999 < parity["cosine"] <= 1 + 1e-12
    result = {"base": "tiny", "pixels": 64, "precision": "fp32", "batch_size": 1, "hardware": "", "date": ""}
    last = table(result | {"trainers": [], "ratios": {}, "parity": parity}).splitlines()[-1]
    assert "4 steps with the same draws" in last and "cosine of 1.00000" in last


def test_a_fast_path_with_a_wrong_scale_is_far_from_the_plain_one(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lora.lora_linear

    def wrong(x: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> Tensor:
        return right(x, base, down, up, 2 * scale)

    monkeypatch.setattr(lora, "lora_linear", wrong)
    parity = compare_paths(task, torch.get_num_threads())
    # Gradients of twice the size: AdamW hides that from the weights, and mostly from a few steps' losses.
    assert parity["grad_norm"] > 0.2
    assert parity["loss"] > 1e-4
