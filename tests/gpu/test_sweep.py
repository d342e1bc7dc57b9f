"""Adapters trained together on a GPU are those that were trained alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.config_sweep import Member
from lora_diffusion.errors import RunError
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.batches import Batch, BatchSource
from tests.shipped import write_ink_config
from tests.sweeps import changed, members_of, train_together, weights_of
from tests.training_runs import distance, prepare

pytestmark = pytest.mark.gpu


# Of what was learned. With more rows other kernels run. TF32 keeps 10 bits of a convolution's factors, bfloat16 7;
# where a gradient is near 0, AdamW makes a step of a learning rate of either.
TOLERANCES = {"fp32": 5e-3, "bf16": 0.3}


def sweep_of_4(folder: Path, device: torch.device, precision: str, *vary: str, **run: Any) -> list[Member]:
    """8 steps of each, trained together."""
    settings = {"precision": precision, "steps": 8} | run
    config = write_ink_config(folder / "base.toml", device.type, run=settings, validation={"every": 0})
    members = members_of(config, *vary)
    assert len(members) == 4
    train_together(members, folder / "sweep")
    return members


def distances(members: Sequence[Member], folder: Path) -> dict[str, float]:
    """From what each learns by itself, launched in the same way."""
    found: dict[str, float] = {}
    for member in members:
        output = folder / f"{member.name}-alone"
        override = f"run.output={json.dumps(str(output))}"
        prepare(member.config.run.output / "config.toml", override).fit()
        found[member.name] = distance(weights_of(member), weights_of(member, output))
    return found


@pytest.fixture
def quiet_on_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU steps are graphs by themselves; on a CPU they are what these are made of."""
    if device.type == "cpu":
        monkeypatch.setattr("lora_diffusion.recipe.launch_of", lambda *_: "quiet")


@pytest.mark.parametrize("precision", TOLERANCES)
def test_members_that_wait_learn_what_they_learn_alone(
    device: torch.device, precision: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    vary = "adapter.rank=4,8", "optimizer.lr=2e-3,1e-3"
    members = sweep_of_4(tmp_path, device, precision, *vary, cuda_graph=False)
    found = distances(members[:: 3 if device.type == "cpu" else 1], tmp_path)
    record_property("distances", found)
    assert max(found.values()) < TOLERANCES[precision]


@pytest.mark.usefixtures("quiet_on_cpu")
@pytest.mark.parametrize("vary", ["optimizer.lr=2e-3,1e-3", "adapter.rank=4,8"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_members_in_one_graph_learn_what_they_learn_in_graphs_of_their_own(
    device: torch.device,
    precision: str,
    vary: str,
    tmp_path: Path,
    graphs: Callable[[], list[int]],
    record_property: Callable[[str, Any], None],
) -> None:
    """Of equal shapes, whose products are made at once, or of others."""
    members = sweep_of_4(tmp_path, device, precision, "run.seed=1,2", vary)
    if device.type == "cuda":
        assert graphs() == [1]
    found = distances(members[:: 3 if device.type == "cpu" else 1], tmp_path)
    record_property("distances", found)
    assert max(found.values()) < TOLERANCES[precision]


@pytest.mark.usefixtures("quiet_on_cpu")
def test_a_member_that_leaves_or_fails_costs_the_others_nothing(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: Callable[[], list[int]]
) -> None:
    """One ends after 5 steps, one fails in the 10th, when a graph runs; two go on to the 20th in a graph of two."""
    config = write_ink_config(
        tmp_path / "base.toml", device.type, run={"precision": "fp32", "steps": 20}, validation={"every": 0}
    )
    members = members_of(config, "run.seed=1,2,3,4")
    members[0] = changed(members[0], "run.steps=5")
    get = BatchSource.__getitem__

    def get_poisoned(source: BatchSource, index: int) -> Batch:
        batch = get(source, index)
        return replace(batch, latents=batch.latents * float("nan")) if (source.seed, index) == (2, 9) else batch

    with monkeypatch.context() as patch:
        patch.setattr(BatchSource, "__getitem__", get_poisoned)
        with pytest.raises(RunError, match=r"(?s)1 of 4 runs .*test-seed2: The loss became nan at step 10"):
            train_together(members, tmp_path / "sweep")

    assert [RunFolder(member.config.run.output).read_state().step for member in members] == [5, 9, 20, 20]
    if device.type == "cuda":
        assert graphs() == [1, 1, 1], "of four, of three and of two"
    assert prepare(members[1].config.run.output / "config.toml", resume=True).step == 9
    found = distances([members[0], members[2]], tmp_path)
    assert max(found.values()) < 2.5 * TOLERANCES["fp32"], "after 20 steps, not 8"
