"""Two processes train the same adapter as one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.training_runs import draw_pictures, launch, prepare, write_config

# Sums of gradients are taken in another order. Adam divides by the gradient's size, so float32 rounding of an almost
# vanishing gradient moves a weight by a part of the learning rate: 12 steps of 1e-4 are 1.2e-3 at most.
TOLERANCE = 1e-5
MEAN_TOLERANCE = 1e-3  # of the norm of what was learned


def test_two_processes_with_batch_2_equal_one_with_batch_4(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", count=11)  # 11: short batches, and one that splits unevenly
    one = {"output": str(tmp_path / "one"), "steps": 12, "batch_size": 4, "save_precision": "fp32"}
    optimizer = {"lr": 1e-4}
    config = write_config(tmp_path / "one.toml", tiny_sd1, pictures, run=one, optimizer=optimizer)
    expected = load_file(prepare(config).fit())

    two = one | {"output": str(tmp_path / "two"), "batch_size": 2}
    config = write_config(tmp_path / "two.toml", tiny_sd1, pictures, run=two, optimizer=optimizer)
    process = launch(config, launcher=("--cpu", "--num_processes", "2", "--num_machines", "1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    found = load_file(tmp_path / "two" / "test.safetensors")
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=TOLERANCE, rtol=0)
    ups = [name for name in expected if "lora_up" in name]
    learned = torch.cat([expected[name].flatten() for name in ups])  # it starts at zero
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in ups])
    assert learned.abs().max() > 2e-4
    assert difference.norm() < MEAN_TOLERANCE * learned.norm()
