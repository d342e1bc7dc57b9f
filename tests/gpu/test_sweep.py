"""Adapters trained together on a GPU are those that were trained alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shipped import write_ink_config
from tests.sweeps import members_of, train_together, weights_of
from tests.training_runs import distance, prepare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-3), ("bf16", 0.3)])
def test_members_learn_what_they_learn_alone(
    device: torch.device, precision: str, tolerance: float, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Tolerances: with more rows other kernels run. TF32 keeps 10 bits of a convolution's factors, bfloat16 7; where a
    gradient is near 0, AdamW makes a step of a learning rate of either.
    """
    config = write_ink_config(
        tmp_path / "base.toml", device.type, run={"precision": precision, "steps": 8}, validation={"every": 0}
    )
    members = members_of(config, "adapter.rank=4,8", "optimizer.lr=2e-3,1e-3")
    train_together(members, tmp_path / "sweep")

    assert len(members) == 4
    distances: dict[str, float] = {}
    for member in members[:: 3 if device.type == "cpu" else 1]:
        output = tmp_path / f"{member.name}-alone"
        override = f"run.output={json.dumps(str(output))}"
        prepare(member.config.run.output / "config.toml", override, "run.cuda_graph=false").fit()
        distances[member.name] = distance(weights_of(member), weights_of(member, output))
    record_property("distances", distances)
    assert max(distances.values()) < tolerance
