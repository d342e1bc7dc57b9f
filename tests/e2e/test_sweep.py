"""Adapters trained together are those that were trained alone; one that stops or fails costs the others nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.config_sweep import Member
from lora_diffusion.errors import RunError, UserError
from lora_diffusion.jobs.follow import RunFollower
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.trainer import Trainer
from tests.sweeps import changed, make_config, members_of, train_together, weights_of
from tests.training_runs import draw_pictures, prepare, tensor_hash

pytestmark = pytest.mark.usefixtures("repeatable_arithmetic")


def alone(member: Member, folder: Path) -> dict[str, Tensor]:
    """The weights of the member's own config.toml, as the sweep left it, trained by itself."""
    config = member.config.run.output / "config.toml"
    output = folder / f"{member.name}-alone"
    prepare(config, f"run.output={json.dumps(str(output))}").fit()
    return weights_of(member, output)


def assert_same_training(together: dict[str, Tensor], apart: dict[str, Tensor]) -> None:
    """Equal but for rounding.

    A matrix product over more rows adds the same float32 numbers in another order, so a gradient differs by about
    1e-6 of its size. AdamW divides by the gradient's own size: where it is near 0, an entry may move by up to a
    learning rate in another direction. So all entries together are compared, and what one may be off is bounded by
    a hundredth of what is learned.
    """
    assert together.keys() == apart.keys()
    assert len(together) > 100
    difference = sum(float((together[name] - apart[name]).square().sum()) for name in apart) ** 0.5
    learned = sum(float(apart[name].square().sum()) for name in apart if "lora_down" not in name) ** 0.5
    assert learned > 0
    assert difference < 1e-3 * learned, f"{difference:.2e} of {learned:.2e}"


def assert_each_as_alone(members: Sequence[Member], tmp_path: Path) -> None:
    for member in members:
        assert_same_training(weights_of(member), alone(member, tmp_path))


def test_ranks_and_rates_together(tiny_sd1: Path, tmp_path: Path) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1), "adapter.rank=2,4", "optimizer.lr=1e-3,3e-4")
    train_together(members, tmp_path / "sweep")

    assert [member.name for member in members][:2] == ["test-rank2-lr1e-3", "test-rank2-lr3e-4"]
    for member in members:
        print(member.name)
        a, b = weights_of(member), alone(member, tmp_path)
        d = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
        u = sum(float(b[n].square().sum()) for n in b if "lora_down" not in n) ** 0.5
        print(d, u, max(float((a[n] - b[n]).abs().max()) for n in a))
    assert_each_as_alone(members, tmp_path)
