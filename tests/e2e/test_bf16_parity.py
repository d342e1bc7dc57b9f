"""Training on a bfloat16 base on a CPU, convolutions packed, against plain float32: the same draws, the same result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.models.packed_conv import PackedConv2d, has_fast_bf16
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import read_metrics
from tests.training_runs import ROOT, prepare, write_config

STEPS = 200


def train(folder: Path, precision: str, steps: int) -> tuple[np.ndarray, Tensor, int]:
    """(loss of each step, all changes of weights as one vector, number of packed convolutions)."""
    folder.mkdir()
    config = write_config(
        folder / "run.toml",
        ROOT / "samples" / "base",
        ROOT / "samples" / "ink",
        run={"steps": steps, "batch_size": 1, "precision": precision},
        dataset={"resolution": 64},
        schedule={"name": "constant", "warmup_steps": 0},
        optimizer={"lr": 1e-4},
    )
    trainer = prepare(config)
    trainer.fit()
    deltas = [module.delta().detach().flatten() for module in trainer.loss.model.modules() if isinstance(module, LoRA)]
    packed = sum(isinstance(module, PackedConv2d) for module in trainer.loss.model.modules())
    losses = [line["loss"] for line in read_metrics(RunFolder(folder / "run").metrics)]
    return np.array(losses), torch.cat(deltas), packed


@pytest.mark.slow
@pytest.mark.skipif(not has_fast_bf16(), reason="this CPU computes bfloat16 in software")
def test_two_hundred_steps_learn_the_same_as_in_plain_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, fast_change, num_packed = train(tmp_path / "fast", "bf16", STEPS)
    monkeypatch.setattr(LoRA, "forward", Adapter.forward)
    plain, plain_change, num_packed_in_plain = train(tmp_path / "plain", "fp32", STEPS)
    assert (num_packed > 5, num_packed_in_plain, len(fast)) == (True, 0, STEPS)
    smooth = np.ones(10) / 10
    curves = [np.convolve(losses, smooth, mode="valid") for losses in (fast, plain)]
    # Measured: 0.7 % at most, and a cosine of 0.9999.
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.01)
    assert torch.cosine_similarity(fast_change, plain_change, dim=0) >= 0.99
    assert plain_change.norm() > 0.1
