"""Compiled transformer blocks on a GPU, inside the graph of a step."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import ROOT, distance, draw_pictures, prepare, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TOLERANCE = 3e-3  # in float32, as in test_training.py: kernels that add in another order


def test_compiled_blocks_learn_the_same(device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = draw_pictures(tmp_path / "pictures")
    adapters: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
    for precision, compiles in product(("fp32", "bf16"), (False, True)):
        folder = tmp_path / f"{precision}-{compiles}"
        folder.mkdir()
        trainer = prepare(
            write_config(
                folder / "run.toml",
                ROOT / "samples" / "base",
                data,
                run={"device": device.type, "precision": precision, "steps": 8},
                model={"compile": compiles},
                dataset={"buckets": False},
            )
        )
        trainer.fit()
        assert trainer.plan.launch == ("quiet" if compiles and device.type == "cpu" else "graph")
        adapters[precision, compiles] = load_file(folder / "run" / "test.safetensors")

    assert "without being compiled" not in caplog.text
    plain = adapters["fp32", False]
    assert distance(plain, adapters["fp32", True]) < TOLERANCE
    # Compiled, values between operations are rounded less often: no farther from float32, but elsewhere.
    assert distance(plain, adapters["bf16", True]) < 1.25 * distance(plain, adapters["bf16", False])
