"""Recorded steps give bit for bit what the operations give when modules and autograd call them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_diffusion.training.recording import StepRecordings
from tests.e2e.test_quiet_run import make_trainer, metrics_of
from tests.sweeps import changed, make_config, members_of, train_together, weights_of
from tests.tiny import make_tiny_sd2, make_tiny_sdxl

RUN = {"steps": 16, "batch_size": 2}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[StepRecordings]:
    """All that are made."""
    made: list[StepRecordings] = []
    init = StepRecordings.__init__

    def watched(own: StepRecordings, *arguments: Any) -> None:
        made.append(own)
        init(own, *arguments)

    monkeypatch.setattr(StepRecordings, "__init__", watched)
    return made


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16": {"run": {"precision": "bf16"}, "adapter": {"targets": "attention-mlp", "rank": 8}},
    "full": {"run": {"precision": "bf16"}, "adapter": {"targets": "full"}},
    "LoHa": {"adapter": {"kind": "loha"}},
    "LoKr": {"adapter": {"kind": "lokr"}},
    "DoRA": {"run": {"precision": "bf16"}, "adapter": {"kind": "dora"}},
    "PiSSA": {"adapter": {"init": "pissa"}},
    "accumulation": {"run": {"gradient_accumulation": 2, "steps": 16}},
    "checkpointing": {"run": {"precision": "bf16"}, "model": {"gradient_checkpointing": True}},
    "nf4": {"model": {"quantise": "nf4"}},
    "int8": {"model": {"quantise": "int8"}, "run": {"precision": "bf16"}},
    "loss": {"loss": {"kind": "huber", "min_snr_gamma": 5.0, "noise_offset": 0.1}},
    "plain attention": {"model": {"attention": "eager"}},
    "previews and validation between": {
        "preview": {"every": 4, "prompts": ["a red cat"], "steps": 2},
        "validation": {"every": 3, "fraction": 0.2},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_same_bit_for_bit(
    tiny_sd1: Path, tmp_path: Path, case: str, recordings: list[StepRecordings]
) -> None:
    sections = CASES[case] | {"run": RUN | CASES[case].get("run", {})}
    compare(tiny_sd1, tmp_path, sections)
    assert len(recordings) == 1 and recordings[0].num_recordings >= 1


@pytest.mark.parametrize("make", [make_tiny_sd2, make_tiny_sdxl])
def test_so_it_is_for_every_family(tmp_path: Path, make: Any, recordings: list[StepRecordings]) -> None:
    base = tmp_path / "base"
    make(base)
    compare(base, tmp_path, {"run": RUN | {"precision": "bf16"}})
    assert recordings[0].num_recordings >= 1


def test_so_it_is_for_a_sweep_also_when_a_member_has_left(
    tiny_sd1: Path, tmp_path: Path, recordings: list[StepRecordings], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_sd1, run={"steps": 8, "precision": "bf16"}, dataset={"buckets": False})
    made = {}
    for launch in ("quiet", "graph"):
        monkeypatch.setattr("lora_diffusion.recipe.launch_of", lambda *_, launch=launch: launch)
        members = members_of(config, "run.seed=1,2,3", overrides=[f"run.output={tmp_path / launch}"])
        train_together([changed(members[0], "run.steps=4"), *members[1:]], tmp_path / f"{launch}-sweep")
        made[launch] = [weights_of(member) for member in members]

    for quiet, graph in zip(made["quiet"], made["graph"], strict=True):
        assert all(torch.equal(quiet[name], graph[name]) for name in quiet)
    assert len(recordings) == 2 and all(steps.num_recordings >= 1 for steps in recordings)  # of three, and of two


def test_what_is_recorded_goes_with_the_last_step(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: pictures are drawn next, and garbage is looked for at times of its own."""
    made: list[weakref.ref[StepRecordings]] = []
    init = StepRecordings.__init__

    def watched(own: StepRecordings, *arguments: Any) -> None:
        made.append(weakref.ref(own))
        init(own, *arguments)

    monkeypatch.setattr(StepRecordings, "__init__", watched)
    trainer = make_trainer(tmp_path, tiny_sd1, "graph", {"run": RUN})
    gc.disable()
    try:
        trainer.fit()
        assert len(made) == 1 and made[0]() is None
    finally:
        gc.enable()


def compare(base: Path, folder: Path, sections: Any) -> None:
    made = {}
    for launch in ("quiet", "graph"):
        trainer = make_trainer(folder / launch, base, launch, sections)
        made[launch] = load_file(trainer.fit())
    assert made["quiet"].keys() == made["graph"].keys()
    assert all(torch.equal(made["quiet"][name], made["graph"][name]) for name in made["quiet"])
    assert metrics_of(folder / "quiet") == metrics_of(folder / "graph")
