"""Steps that are launched without waiting for values train, log and fail as those that are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_diffusion.adapters.together import Together
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import RunError
from lora_diffusion.recipe import launch_of
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.quiet_step import QuietLoop, Reading
from lora_diffusion.training.trainer import Trainer
from tests.training_runs import draw_pictures, prepare, write_config

DATA: dict[str, dict[str, Any]] = {
    "run": {"steps": 8, "gradient_accumulation": 2, "save_every": 4},
    "validation": {"every": 3, "fraction": 0.2},
    "adapter": {"targets": "attention-mlp"},
}


def make_trainer(folder: Path, base: Path, launch: Launch, sections: Any = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    config = folder / "run.toml"
    is_resumed = config.exists()
    if not is_resumed:
        write_config(config, base, draw_pictures(folder / "pictures"), **(sections or {}))
    trainer = prepare(config, resume=is_resumed)
    trainer.plan = replace(trainer.plan, launch=launch)
    return trainer


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_it_learns_and_logs_what_a_waiting_run_does(tiny_sd1: Path, tmp_path: Path) -> None:
    adapters = []
    for launch in ("eager", "quiet"):
        trainer = make_trainer(tmp_path / launch, tiny_sd1, launch, DATA)
        adapters.append(load_file(trainer.fit()))

    eager, quiet = adapters
    assert eager.keys() == quiet.keys()
    for name in eager:  # the norm's squares are added in another order; float16 in the file
        torch.testing.assert_close(quiet[name], eager[name], rtol=1e-3, atol=1e-5)
    rows = metrics_of(tmp_path / "eager"), metrics_of(tmp_path / "quiet")
    assert [row["step"] for row in rows[1]] == list(range(1, 9))
    assert ["val_loss" in row for row in rows[1]] == [step in (3, 6, 8) for step in range(1, 9)]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    folders = [sorted(path.name for path in (tmp_path / name / "run").rglob("*")) for name in ("eager", "quiet")]
    assert folders[0] == folders[1]


def test_it_resumes_bit_for_bit_and_from_a_waiting_run(tiny_sd1: Path, tmp_path: Path) -> None:
    whole = load_file(make_trainer(tmp_path / "whole", tiny_sd1, "quiet", DATA).fit())
    for first in ("quiet", "eager"):
        trainer = make_trainer(tmp_path / first, tiny_sd1, first, DATA)
        trainer.plan = replace(trainer.plan, steps=4)
        trainer.fit()
        trainer = make_trainer(tmp_path / first, tiny_sd1, "quiet")
        assert trainer.step == 4
        resumed = load_file(trainer.fit())
        if first == "quiet":
            assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        else:
            for name in whole:
                torch.testing.assert_close(resumed[name], whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "sections", "launch"),
    [
        ("bf16", {}, "graph"),
        ("fp32", {}, "graph"),
        ("bf16", {"run": {"cuda_graph": False}}, "quiet"),
        ("fp32", {"run": {"cuda_graph": False}}, "eager"),
        ("fp32", {"model": {"compile": True}}, "quiet"),
        ("bf16", {"adapter": {"dropout": 0.1}}, "eager"),
        ("bf16", {"adapter": {"max_norm": 1.0}}, "eager"),
        ("fp32", {"optimizer": {"name": "adamw8bit"}}, "eager"),
    ],
)
def test_on_a_cpu_steps_are_launched_as_a_whole_where_none_needs_the_host(
    tmp_path: Path, precision: str, sections: dict[str, dict[str, Any]], launch: Launch
) -> None:
    sections = sections | {"run": sections.get("run", {}) | {"precision": precision}}
    config = TrainConfig.load(write_config(tmp_path / "run.toml", tmp_path, tmp_path, **sections))
    assert launch_of(config, torch.device("cpu"), num_processes=1) == launch


def test_in_bfloat16_projections_of_one_input_are_computed_together_and_a_resume_is_exact(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = Together.__call__
    monkeypatch.setattr(Together, "__call__", lambda own, x: calls.append(len(own.loras)) or compute(own, x))
    sections = DATA | {"run": DATA["run"] | {"precision": "bf16"}, "adapter": {"rank": 8}}
    whole = load_file(make_trainer(tmp_path / "whole", tiny_sd1, "quiet", sections).fit())
    assert {2, 3} == set(calls)

    trainer = make_trainer(tmp_path / "halved", tiny_sd1, "quiet", sections)
    trainer.plan = replace(trainer.plan, steps=4)
    trainer.fit()
    resumed = load_file(make_trainer(tmp_path / "halved", tiny_sd1, "quiet").fit())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def poison_step_3(trainer: Trainer) -> str:
    """Returns the name of the picture."""
    poisoned = trainer.source.batches.batch(2)[0]  # first drawn at step 3
    name = trainer.source.samples[poisoned.sample].image.name
    get = trainer.source.latents.get

    def get_poisoned(sample: Any, flipped: bool = False) -> Any:
        mean, std = get(sample, flipped)
        return (mean * float("nan"), std) if sample.image.name == name else (mean, std)

    trainer.source.latents.get = get_poisoned
    return name


def test_a_loss_that_is_not_finite_is_told_late_and_saves_the_last_good_step(tiny_sd1: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "broken", tiny_sd1, "quiet")
    name = poison_step_3(trainer)
    with pytest.raises(RunError, match=rf"loss became nan at step 3 .*{name}"):
        trainer.fit()

    good = make_trainer(tmp_path / "good", tiny_sd1, "quiet")
    good.plan = replace(good.plan, steps=2)
    good.fit()
    resumed = make_trainer(tmp_path / "broken", tiny_sd1, "quiet")
    assert resumed.step == 2 and [row["step"] for row in metrics_of(tmp_path / "broken")] == [1, 2]
    tensors, expected = resumed.exporter.tensors(), good.exporter.tensors()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_one_that_arrives_when_a_later_step_is_to_be_saved_ends_the_run(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = QuietLoop.readings

    def late(loop: QuietLoop, *, owed: int) -> list[Reading]:
        return readings(loop, owed=owed) if owed == 0 else []

    monkeypatch.setattr(QuietLoop, "readings", late)
    trainer = make_trainer(tmp_path, tiny_sd1, "quiet", {"run": {"save_every": 4}})
    poison_step_3(trainer)
    with pytest.raises(RunError, match="loss became nan at step 3"):
        trainer.fit()
    assert sorted(path.name for path in trainer.run.path.rglob("0*")) == ["000002"]
