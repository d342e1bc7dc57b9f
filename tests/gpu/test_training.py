"""Whole trainings on a GPU: steps launched as graphs learn, log, stop and go on as those that are waited for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lora_diffusion.cli import app
from lora_diffusion.errors import RunError
from lora_diffusion.training.quiet_step import QuietStep
from lora_diffusion.training.tracking import read_metrics
from tests.shipped import write_ink_config
from tests.training_runs import distance, draw_pictures, prepare, prepare_quiet, write_config

pytestmark = pytest.mark.gpu

Graphs = Callable[[], list[int]]

# Of what was learned. Kernels of a GPU add in an order of their own: the same 8 steps in float32 twice, one operation
# at a time, were 8e-4 apart on an H200. In half precision layers with one input are computed together besides, a last
# bit is 0.4 %, and AdamW turns that of a small gradient into a part of the learning rate. The last step of these runs,
# at the end of a cosine, is 4e-3.
TOLERANCES = {"fp32": 3e-3, "bf16": 5e-2, "fp16": 5e-2}


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_run_learns_and_logs_the_same_with_and_without_graphs(
    device: torch.device, precision: str, tmp_path: Path, graphs: Graphs, record_property: Callable[[str, Any], None]
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 is for GPUs")
    adapters = []
    for cuda_graph in (True, False):
        output = tmp_path / f"graph-{cuda_graph}"
        run = {"precision": precision, "cuda_graph": cuda_graph, "output": str(output)}
        config = write_ink_config(tmp_path / f"{cuda_graph}.toml", device.type, run=run)
        result = CliRunner().invoke(app, ["train", "--config", str(config)])
        assert result.exit_code == 0, result.output
        lines = read_metrics(output / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 13))
        assert all(math.isfinite(line[key]) for line in lines for key in ("loss", "grad_norm", "lr", "seconds"))
        validation = [line["val_loss"] for line in lines if "val_loss" in line]
        assert len(validation) == 3 and validation[-1] < 0.97 * validation[0], validation
        adapters.append(load_file(output / "test.safetensors"))
    record_property("distance", distance(*adapters))
    assert distance(*adapters) < TOLERANCES[precision]
    if device.type == "cuda":
        assert graphs() == ([] if precision == "fp16" else [1]), "the loss scaler of fp16 asks for values"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_was_not(
    device: torch.device,
    precision: str,
    tmp_path: Path,
    graphs: Graphs,
    record_property: Callable[[str, Any], None],
) -> None:
    run = {"precision": precision}
    whole = load_file(prepare_quiet(write_ink_config(tmp_path / "whole.toml", device.type, run=run)).fit())
    run |= {"output": str(tmp_path / "parts")}
    config = write_ink_config(tmp_path / "parts.toml", device.type, run=run)
    first = prepare_quiet(config)
    first.plan = replace(first.plan, steps=7)
    first.fit()
    second = prepare_quiet(config, resume=True)
    assert second.step == 7
    resumed = load_file(second.fit())

    record_property("is_equal", all(torch.equal(resumed[name], whole[name]) for name in whole))
    record_property("distance", distance(resumed, whole))
    assert distance(resumed, whole) < TOLERANCES[precision]
    if device.type == "cuda":
        assert graphs() == [1, 1, 1]


def test_without_graphs_a_resumed_run_ends_as_one_that_was_not_interrupted(
    device: torch.device, tmp_path: Path
) -> None:
    run = {"cuda_graph": False, "steps": 8, "precision": "bf16"}
    whole = load_file(prepare(write_ink_config(tmp_path / "whole.toml", device.type, run=run)).fit())
    config = write_ink_config(tmp_path / "parts.toml", device.type, run=run | {"output": str(tmp_path / "parts")})
    first = prepare(config)
    first.plan = replace(first.plan, steps=3)
    first.fit()
    resumed = load_file(prepare(config, resume=True).fit())

    assert distance(resumed, whole) < TOLERANCES["bf16"]


def test_a_loss_that_is_not_finite_in_a_graph_is_told_with_its_step_and_changes_nothing(
    device: torch.device,
    tiny_sd1: Path,
    tmp_path: Path,
    graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = {"buckets": False}
    run = {"steps": 12, "device": device.type, "precision": "fp32"}
    pictures = draw_pictures(tmp_path / "pictures", 8)
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run=run, dataset=data)
    trainer = prepare_quiet(config)
    name = trainer.source.samples[trainer.source.batches.batch(8)[0].sample].image.name  # the first one of step 9
    get, num_reads = trainer.source.latents.get, 0

    def get_poisoned(sample: Any, flipped: bool = False) -> Any:
        nonlocal num_reads
        num_reads += 1
        mean, std = get(sample, flipped)
        return (mean * float("nan"), std) if num_reads == 2 * 8 + 1 else (mean, std)

    trainer.source.latents.get = get_poisoned
    call, after_8, num_calls = QuietStep.__call__, list[Tensor](), 0

    def watched(step: QuietStep, *arguments: Any) -> None:
        nonlocal num_calls
        call(step, *arguments)
        num_calls += 1
        if num_calls == 8:
            after_8.extend(parameter.detach().clone() for parameter in trainer.parameters)

    monkeypatch.setattr(QuietStep, "__call__", watched)
    with pytest.raises(RunError, match=rf"loss became nan at step 9 .*{name}"):
        trainer.fit()

    assert [line["step"] for line in read_metrics(trainer.run.metrics)] == list(range(1, 9))
    assert num_calls >= 9  # on a GPU some are launched before the failure is known
    assert all(torch.equal(now, then) for now, then in zip(trainer.parameters, after_8, strict=True))
    saved = prepare(tmp_path / "run.toml", resume=True)
    assert saved.step == 8
    assert all(torch.equal(now, then) for now, then in zip(saved.parameters, after_8, strict=True))
    if device.type == "cuda":
        assert graphs() == [1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_previews_and_validation_between_the_steps_change_nothing(
    device: torch.device,
    precision: str,
    tmp_path: Path,
    graphs: Graphs,
    record_property: Callable[[str, Any], None],
) -> None:
    run = {"precision": precision}
    plain = write_ink_config(tmp_path / "plain.toml", device.type, run=run, validation={"every": 1000})  # at the end
    preview = {"every": 4, "prompts": ["a cat, ink style"], "steps": 3, "cfg": 3.0}
    run |= {"output": str(tmp_path / "watched")}
    watched = write_ink_config(
        tmp_path / "watched.toml", device.type, run=run, preview=preview, validation={"every": 3}
    )
    expected, found = (load_file(prepare_quiet(config).fit()) for config in (plain, watched))

    assert len(list((tmp_path / "watched" / "previews").glob("*.png"))) == 4
    record_property("is_equal", all(torch.equal(found[name], expected[name]) for name in expected))
    record_property("distance", distance(found, expected))
    assert distance(found, expected) < TOLERANCES[precision]
    if device.type == "cuda":
        assert graphs() == [1, 1]


def test_each_bucket_has_a_graph(
    device: torch.device, tiny_sd1: Path, tmp_path: Path, graphs: Graphs, record_property: Callable[[str, Any], None]
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 12)  # 4 wide and 8 square ones: no batch of 2 is short
    run = {"steps": 18, "device": device.type, "save_precision": "fp32", "precision": "fp32"}
    adapters = []
    for make in (prepare, prepare_quiet):
        folder = tmp_path / make.__name__
        folder.mkdir()
        config = write_config(folder / "run.toml", tiny_sd1, pictures, run=run, dataset={"resolution": [96, 64]})
        override = f"run.cuda_graph={'true' if make is prepare_quiet else 'false'}"
        trainer = make(config, override)
        assert len({sample.bucket for sample in trainer.source.samples}) == 2
        adapters.append(load_file(trainer.fit()))

    record_property("distance", distance(*adapters))
    assert distance(*adapters) < TOLERANCES["fp32"]
    if device.type == "cuda":
        assert graphs() == [2]
