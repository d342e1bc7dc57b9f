"""Training on a bfloat16 base on a CPU, convolutions packed, against plain float32: the same draws, the same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.parity import compare, train, train_plainly
from lora_diffusion.config import TrainConfig
from lora_diffusion.models.packed_conv import has_fast_bf16
from tests.training_runs import ROOT, write_config

STEPS = 200


def config(folder: Path, precision: str) -> TrainConfig:
    folder.mkdir()
    path = write_config(
        folder / "run.toml",
        ROOT / "samples" / "base",
        ROOT / "samples" / "ink",
        run={"steps": STEPS, "batch_size": 1, "precision": precision},
        dataset={"resolution": 64},
        schedule={"name": "constant", "warmup_steps": 0},
        optimizer={"lr": 1e-4},
    )
    return TrainConfig.load(path)


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_bf16(), reason="this CPU computes bfloat16 in software")
def test_two_hundred_steps_learn_the_same_as_in_plain_float32(tmp_path: Path) -> None:
    fast = train(config(tmp_path / "fast", "bf16"))
    plain = train_plainly(config(tmp_path / "plain", "fp32"))
    assert (fast.num_packed > 5, plain.num_packed, len(fast.losses)) == (True, 0, STEPS)
    parity = compare(fast, plain, window=10)
    # Measured: 0.7 % at most, and a cosine of 0.9999.
    assert parity.loss < 0.01
    assert parity.cosine >= 0.99
    assert plain.norm() > 0.1
