"""Two processes train the same adapter as one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.training_runs import draw_pictures, launch, prepare, write_config

# Sums of gradients are taken in another order: float32 rounding, carried through 12 Adam steps.
TOLERANCE = 1e-5


def test_two_processes_with_batch_2_equal_one_with_batch_4(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", count=11)  # 11: short batches, and one that splits unevenly
    one = {"output": str(tmp_path / "one"), "steps": 12, "batch_size": 4, "save_precision": "fp32"}
    expected = load_file(prepare(write_config(tmp_path / "one.toml", tiny_sd1, pictures, run=one)).fit())

    two = one | {"output": str(tmp_path / "two"), "batch_size": 2}
    config = write_config(tmp_path / "two.toml", tiny_sd1, pictures, run=two)
    process = launch(config, launcher=("--cpu", "--num_processes", "2", "--num_machines", "1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    found = load_file(tmp_path / "two" / "test.safetensors")
    assert found.keys() == expected.keys()
    assert len(found) > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=TOLERANCE, rtol=0)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in found.items() if "lora_up" in name), "nothing was learned"
