"""Compiled transformer blocks on a GPU, inside the graph of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import ROOT, distance, draw_pictures, prepare, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TOLERANCES = {"fp32": 3e-3, "bf16": 5e-2}  # as in test_training.py: kernels that add in another order


@pytest.mark.parametrize("precision", TOLERANCES)
def test_compiled_blocks_learn_the_same(device: torch.device, tmp_path: Path, precision: str) -> None:
    data = draw_pictures(tmp_path / "pictures")
    adapters = []
    for compiles in (False, True):
        folder = tmp_path / str(compiles)
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
        assert trainer.plan.launch == ("graph" if device.type == "cuda" else "eager")
        adapters.append(load_file(folder / "run" / "test.safetensors"))
    assert all(bool(tensor.isfinite().all()) for tensor in adapters[1].values())
    assert distance(*adapters) < TOLERANCES[precision]
