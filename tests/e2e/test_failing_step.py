"""A step that fails before its update costs none of the steps before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.errors import RunError
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.checkpoint import checkpoint_folders
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.previews import Previewer
from lora_diffusion.training.shares import joint_losses
from lora_diffusion.training.trainer import Trainer
from tests.sweeps import make_config, members_of, train_together
from tests.training_runs import draw_pictures, prepare, tensor_hash, write_config


def make_trainer(folder: Path, base: Path, launch: Launch) -> Trainer:
    config = folder / "run.toml"
    is_resumed = config.exists()
    if not is_resumed:
        run = {"steps": 4, "gradient_accumulation": 2}
        write_config(config, base, draw_pictures(folder / "pictures"), run=run)
    trainer = prepare(config, resume=is_resumed)
    trainer.plan = replace(trainer.plan, launch=launch)
    return trainer


def fail_at_call(number: int) -> Callable[..., None]:
    """A hook for forward passes."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise torch.OutOfMemoryError("no memory is left")

    return hook


@pytest.mark.parametrize("launch", ["eager", "quiet", "graph"])
def test_a_resume_after_it_ends_as_a_run_without_it(
    tiny_sd1: Path, tmp_path: Path, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    whole = make_trainer(tmp_path / "whole", tiny_sd1, launch).fit()
    failing = make_trainer(tmp_path / "failing", tiny_sd1, launch)
    failing.loss.model.unet.register_forward_pre_hook(fail_at_call(6))  # the second of two of step 3
    with pytest.raises(torch.OutOfMemoryError):
        failing.fit()

    assert failing.run.read_state().step == 2
    assert "OutOfMemoryError after step 2, whose weights are saved." in caplog.text
    resumed = make_trainer(tmp_path / "failing", tiny_sd1, launch)
    assert resumed.step == 2
    assert tensor_hash(resumed.fit()) == tensor_hash(whole)


def test_the_error_is_told_where_the_steps_before_cannot_be_saved(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, tiny_sd1, "eager")
    trainer.run.checkpoints.touch()  # a file where the folder should be
    trainer.loss.model.unet.register_forward_pre_hook(fail_at_call(3))
    with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
        trainer.fit()
    assert "what was learned before cannot be saved" in caplog.text


@pytest.mark.parametrize(("as_a_whole", "module"), [(True, "quiet_step"), (False, "joint")])
def test_in_a_sweep_every_member_keeps_its_steps(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_whole: bool, module: str
) -> None:
    num_calls = 0

    def failing(group: list) -> list[torch.Tensor]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise torch.OutOfMemoryError
        return joint_losses(group)

    monkeypatch.setattr(f"lora_diffusion.training.{module}.joint_losses", failing)
    members = members_of(make_config(tmp_path, tiny_sd1, run={"cuda_graph": as_a_whole}), "run.seed=1,2")
    with pytest.raises(RunError, match="Out of memory"):
        train_together(members, tmp_path / "sweep")

    runs = [RunFolder(member.config.run.output) for member in members]
    assert [run.read_state().step for run in runs] == [2, 2]
    assert [[path.name for path in checkpoint_folders(run.checkpoints)] for run in runs] == [["000002"]] * 2


@pytest.mark.parametrize(("as_a_whole", "drawing"), [(True, "next_inputs"), (False, "next_micro_batches")])
def test_a_member_of_a_sweep_whose_pictures_are_gone_keeps_its_steps(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_whole: bool, drawing: str
) -> None:
    draw = getattr(Trainer, drawing)

    def failing(trainer: Trainer) -> Any:
        if trainer.name == "test-seed2" and trainer.step == 2:
            raise OSError("the disk is gone")
        return draw(trainer)

    monkeypatch.setattr(Trainer, drawing, failing)
    run = {"steps": 3, "cuda_graph": as_a_whole}
    members = members_of(make_config(tmp_path, tiny_sd1, run=run), "run.seed=1,2")
    with pytest.raises(RunError, match=r"(?s)1 of 2 runs.*test-seed2: the disk is gone"):
        train_together(members, tmp_path / "sweep")

    runs = [RunFolder(member.config.run.output) for member in members]
    assert [(run.read_state().status, run.read_state().step) for run in runs] == [("finished", 3), ("failed", 2)]
    assert [path.name for path in checkpoint_folders(runs[1].checkpoints)] == ["000002"]


@pytest.mark.parametrize("as_a_whole", [True, False])
@pytest.mark.parametrize(
    ("error", "told"),
    [(torch.OutOfMemoryError("no memory is left"), "Out of memory"), (KeyError("x"), "KeyError: 'x'")],
)
def test_a_member_of_a_sweep_that_fails_between_two_steps_keeps_its_own_and_the_others_go_on(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_a_whole: bool, error: Exception, told: str
) -> None:
    do_what_is_due = Trainer.do_what_is_due

    def failing(trainer: Trainer) -> None:
        if trainer.name == "test-seed2" and trainer.step == 2:
            raise error
        do_what_is_due(trainer)

    monkeypatch.setattr(Trainer, "do_what_is_due", failing)
    run = {"steps": 3, "cuda_graph": as_a_whole}
    members = members_of(make_config(tmp_path, tiny_sd1, run=run), "run.seed=1,2")
    with pytest.raises(RunError, match=rf"(?s)1 of 2 runs.*test-seed2: {told}"):
        train_together(members, tmp_path / "sweep")

    runs = [RunFolder(member.config.run.output) for member in members]
    assert [(run.read_state().status, run.read_state().step) for run in runs] == [("finished", 3), ("failed", 2)]
    assert [path.name for path in checkpoint_folders(runs[1].checkpoints)] == ["000002"]


def test_runs_of_a_sweep_that_are_trained_are_finished_whatever_their_pictures_run_into(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Previewer, "draw_contact_sheet", fail)
    monkeypatch.setattr("lora_diffusion.sweep_run.draw_contact_sheet", fail)
    members = members_of(
        make_config(tmp_path, tiny_sd1, run={"steps": 2}, schedule={"warmup_steps": 0}), "run.seed=1,2"
    )
    train_together(members, tmp_path / "sweep")

    assert [RunFolder(member.config.run.output).read_state().status for member in members] == ["finished"] * 2
    assert caplog.text.count("model card cannot be written (MemoryError: )") == 2
    assert caplog.text.count("contact sheet and loss plot cannot be written (MemoryError: )") == 1
