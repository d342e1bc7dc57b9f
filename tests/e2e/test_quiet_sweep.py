"""A sweep whose steps are launched without waiting for values: each member learns, logs and fails as it does alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_sweep import Member
from lora_diffusion.errors import RunError
from lora_diffusion.runs import Control, RunFolder
from lora_diffusion.training.batches import Batch, BatchSource
from lora_diffusion.training.quiet_step import QuietStep
from lora_diffusion.training.tracking import read_metrics
from lora_diffusion.training.trainer import Trainer
from tests.sweeps import changed, make_config, members_of, train_together, weights_of
from tests.training_runs import distance, prepare, tensor_hash

pytestmark = pytest.mark.usefixtures("repeatable_arithmetic")

CLOSE = 1e-4  # of what was learned, as for sweeps that wait; see `distance`
CLOSE_IN_BF16 = 0.2  # each alone is 0.10 to 0.13 off what it learns in float32; members are 130 off one another


@contextmanager
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, steps are launched as on a GPU, except where an adapter drops parts; yields each step's member count."""
    counts: list[int] = []
    call = QuietStep.__call__

    def watched(step: QuietStep, inputs: Any) -> None:
        counts.append(len(inputs))
        call(step, inputs)

    def launch(config: TrainConfig, *_: object) -> str:
        return "eager" if config.adapter.dropout else "quiet"

    with monkeypatch.context() as patch:
        patch.setattr("lora_diffusion.recipe.launch_of", launch)
        patch.setattr(QuietStep, "__call__", watched)
        yield counts


@contextmanager
def asking(monkeypatch: pytest.MonkeyPatch, command: Control, steps: dict[str, int]) -> Iterator[None]:
    """Inside, members are asked something through their control files as soon as they are at a step."""
    do_what_is_due = Trainer.do_what_is_due

    def asked(trainer: Trainer) -> None:
        if trainer.step == steps.get(trainer.name):
            trainer.run.ask(command)
        do_what_is_due(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "do_what_is_due", asked)
        yield


def alone(member: Member, folder: Path, *overrides: str) -> Path:
    """The folder of a run that waits, of the member's own config."""
    config = member.config.run.output / "config.toml"
    output = folder / f"{member.name}-alone"
    prepare(config, f"run.output={json.dumps(str(output))}", *overrides).fit()
    return output


def assert_each_as_alone(members: Sequence[Member], tmp_path: Path) -> None:
    for member in members:
        assert distance(weights_of(member), weights_of(member, alone(member, tmp_path))) < CLOSE


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_members_learn_log_and_save_what_they_do_alone(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, kinds, lengths, accumulation, batch sizes and the order of buckets differ at once."""
    config = make_config(tmp_path, tiny_sd1, run={"save_every": 2}, validation={"every": 2, "fraction": 0.2})
    first, second, third = members_of(config, "run.seed=1,2,3")
    second = changed(second, "run.gradient_accumulation=2", "run.steps=3", "adapter.rank=2")
    third = changed(third, "run.batch_size=3", 'adapter.kind="dora"', 'adapter.targets="full"')
    members = [first, second, third]
    with quiet(monkeypatch) as counts:
        train_together(members, tmp_path / "sweep")

    assert counts == [3, 3, 3, 2, 2]
    for member in members:
        output = alone(member, tmp_path)
        assert distance(weights_of(member), weights_of(member, output)) < CLOSE
        rows, expected = rows_of(member.config.run.output), rows_of(output)
        assert len(rows) == member.config.run.steps
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-3)
        files = [
            {path.relative_to(root) for path in root.rglob("*.safetensors")}
            for root in (member.config.run.output, output)
        ]
        assert files[0] == files[1] and len(files[0]) > 1


def test_in_bfloat16_on_a_cpu_members_learn_what_they_do_alone_also_around_transformers(
    tiny_sd1: Path, tmp_path: Path
) -> None:
    """As users start it; the projections around the transformers are convolutions of one pixel."""
    run, adapter = {"precision": "bf16"}, {"targets": "attention-mlp"}
    members = members_of(make_config(tmp_path, tiny_sd1, run=run, adapter=adapter), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")

    for member in members:
        together, apart = weights_of(member), weights_of(member, alone(member, tmp_path))
        assert any("proj_in" in name for name in together)
        assert distance(together, apart) < CLOSE_IN_BF16


def test_a_loss_that_is_not_finite_ends_its_member_at_its_last_good_step_and_no_other(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = members_of(make_config(tmp_path, tiny_sd1), "run.seed=1,2,3")
    get = BatchSource.__getitem__

    def get_poisoned(source: BatchSource, index: int) -> Batch:
        batch = get(source, index)
        return replace(batch, latents=batch.latents * float("nan")) if (source.seed, index) == (2, 2) else batch

    with quiet(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(BatchSource, "__getitem__", get_poisoned)
        with pytest.raises(RunError, match=r"(?s)1 of 3 runs .*test-seed2: The loss became nan at step 3"):
            train_together(members, tmp_path / "sweep")

    failed = RunFolder(members[1].config.run.output)
    assert (failed.read_state().status, failed.read_state().step) == ("failed", 2)
    assert [row["step"] for row in read_metrics(failed.metrics)] == [1, 2]
    assert_each_as_alone(members[::2], tmp_path)
    good = alone(members[1], tmp_path, "run.save_every=2")
    saved = prepare(failed.config, resume=True)
    saved.finish()
    assert saved.step == 2
    at_2 = f"{members[1].name}-000002.safetensors"
    assert distance(load_file(failed.path / at_2), load_file(good / at_2)) < CLOSE


def test_a_sweep_that_was_stopped_is_resumed_to_the_same_bits(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, tiny_sd1)
    whole, parts = (
        members_of(config, "run.seed=1,2,3", overrides=[f"run.output={tmp_path / name}"]) for name in ("whole", "parts")
    )
    with quiet(monkeypatch):
        train_together(whole, tmp_path / "sweep-1")
        with asking(monkeypatch, "stop", {member.name: 3 for member in parts}):
            train_together(parts, tmp_path / "sweep-2")
        states = [RunFolder(member.config.run.output).read_state() for member in parts]
        assert [(state.status, state.step) for state in states] == [("stopped", 3)] * 3
        train_together(parts, tmp_path / "sweep-2", resume=True)

    for one, other in zip(whole, parts, strict=True):
        file = f"{one.name}.safetensors"
        assert tensor_hash(one.config.run.output / file) == tensor_hash(other.config.run.output / file)


def test_members_are_saved_drawn_and_stopped_as_their_control_files_ask(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preview = {"prompts": ["a red cat"], "steps": 1, "cfg": 1.0}
    members = members_of(make_config(tmp_path, tiny_sd1, preview=preview), "run.seed=1,2,3")
    with (
        quiet(monkeypatch) as counts,
        asking(monkeypatch, "save_now", {members[0].name: 2}),
        asking(monkeypatch, "sample_now", {members[0].name: 3}),
        asking(monkeypatch, "stop", {members[1].name: 2}),
    ):
        train_together(members, tmp_path / "sweep")

    assert counts == [3, 3, 2, 2, 2]
    runs = [RunFolder(member.config.run.output) for member in members]
    assert [(run.read_state().status, run.read_state().step) for run in runs] == [
        ("finished", 5),
        ("stopped", 2),
        ("finished", 5),
    ]
    assert runs[0].preview(3, 0).exists() and not runs[2].preview(3, 0).exists()
    for member, run in zip(members[:2], runs, strict=False):
        output = alone(member, tmp_path, "run.save_every=2", "preview.every=0")
        at_2 = f"{member.name}-000002.safetensors"
        assert distance(load_file(run.path / at_2), load_file(output / at_2)) < CLOSE


def test_with_one_member_that_waits_all_do(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    config = make_config(tmp_path, tiny_sd1, run={"steps": 2}, schedule={"warmup_steps": 0})

    def trained(name: str) -> list[dict[str, Tensor]]:
        members = members_of(config, "adapter.dropout=0,0.3", overrides=[f"run.output={tmp_path / name}"])
        train_together(members, tmp_path / f"{name}-sweep")
        return [weights_of(member) for member in members]

    waiting = trained("waiting")
    with quiet(monkeypatch) as counts:
        assert all(
            bool((one[key] == other[key]).all())
            for one, other in zip(waiting, trained("asked"), strict=True)
            for key in one
        )
    assert counts == []
    assert "as those of test-dropout0.3 must be" in caplog.text
