"""Validation costs no step, takes no more memory than one, and leaves the run reachable."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_diffusion.errors import RunError
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.checkpoint import checkpoint_folders
from lora_diffusion.training.plan import Launch
from lora_diffusion.training.tracking import read_metrics
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training.validation import Validator
from tests.clock import count_passes
from tests.sweeps import make_config, members_of, train_together
from tests.training_runs import draw_pictures, prepare, write_config

RUN: dict[str, Any] = {"steps": 4, "batch_size": 3}
VALIDATION: dict[str, Any] = {"every": 2, "fraction": 0.2}
NUM_CALLS = 4  # of the UNet, in one validation: 2 of 10 pictures, whose 4 timesteps are 3 rows and 1

both_launches = pytest.mark.parametrize("launch", ["eager", "quiet"])


def make_trainer(folder: Path, base: Path, launch: Launch = "eager") -> Trainer:
    config = folder / "run.toml"
    is_resumed = config.exists()
    if not is_resumed:
        write_config(config, base, draw_pictures(folder / "pictures"), run=RUN, validation=VALIDATION)
    trainer = prepare(config, resume=is_resumed)
    trainer.plan = replace(trainer.plan, launch=launch)
    return trainer


def on_validation(trainer: Trainer, action: Callable[[Tensor], None]) -> None:
    """Call `action` with the latents whenever the UNet computes without gradients, as it does to validate."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            action(arguments[0])

    trainer.loss.model.unet.register_forward_pre_hook(hook)


@both_launches
def test_one_that_fails_costs_none_of_the_steps_before_it(
    tiny_sd1: Path, tmp_path: Path, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    trainer = make_trainer(tmp_path, tiny_sd1, launch)
    on_validation(trainer, fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()

    assert "OutOfMemoryError after step 2, whose weights are saved." in caplog.text
    assert make_trainer(tmp_path, tiny_sd1).step == 2


@pytest.mark.parametrize("as_a_whole", [True, False])
@pytest.mark.parametrize(
    ("error", "told"),
    [(torch.OutOfMemoryError(), "Out of memory"), (OSError("the disk is gone"), "the disk is gone")],
    ids=["memory", "disk"],
)
def test_in_a_sweep_it_costs_none_either_and_ends_one_member_only(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    as_a_whole: bool,
    error: Exception,
    told: str,
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")
    measure = Validator.measure

    def failing(validator: Validator, *arguments: Any) -> float:
        if validator.seed == 1:
            raise error
        return measure(validator, *arguments)

    monkeypatch.setattr(Validator, "measure", failing)
    config = make_config(tmp_path, tiny_sd1, run=RUN | {"cuda_graph": as_a_whole}, validation=VALIDATION)
    members = members_of(config, "run.seed=1,2")
    with pytest.raises(RunError, match=f"(?s)1 of 2 runs.*test-seed1: {told}"):
        train_together(members, tmp_path / "sweep")

    runs = [RunFolder(member.config.run.output) for member in members]
    assert [run.read_state().status for run in runs] == ["failed", "finished"]
    saved = [[path.name for path in checkpoint_folders(run.checkpoints)] for run in runs]
    assert saved == [["000002"], ["000004"]]
    assert caplog.text.count(f"{type(error).__name__} after step 2, whose weights are saved.") == 1


def test_it_computes_no_more_rows_at_once_than_a_step_and_measures_the_same(tiny_sd1: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_sd1)
    rows: list[int] = []
    on_validation(trainer, lambda latents: rows.append(len(latents)))
    validator = trainer.validator
    assert validator is not None and validator.rows == RUN["batch_size"]

    def measured(num_rows: int) -> tuple[float, list[int]]:
        rows.clear()
        value = replace(validator, rows=num_rows).measure(trainer.loss, trainer.accelerator.device)
        return value, list(rows)

    expected, at_once = measured(4)
    assert at_once == [4, 4]
    for num_rows, seen in ((1, [1] * 8), (3, [3, 1] * 2), (8, [4, 4])):
        value, at_once = measured(num_rows)
        assert at_once == seen
        assert value == pytest.approx(expected, rel=1e-5)  # float32 sums of other batches round differently


@both_launches
def test_a_stop_is_obeyed_while_it_goes_on_and_leaves_its_value_out(
    tiny_sd1: Path, tmp_path: Path, launch: Launch
) -> None:
    trainer = make_trainer(tmp_path, tiny_sd1, launch)
    num_calls = 0

    def stop(_: Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        trainer.run.control.mkdir(exist_ok=True)
        trainer.run.ask("stop")

    on_validation(trainer, stop)
    trainer.fit()

    assert (trainer.step, trainer.stop.reason, num_calls) == (2, "control/stop", 1)
    lines = read_metrics(trainer.run.metrics)
    assert [line["step"] for line in lines] == [1, 2] and not any("val_loss" in line for line in lines)
    assert make_trainer(tmp_path, tiny_sd1).step == 2


def test_it_gives_signs_of_life(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    beat = RunFolder.beat

    def counted(run: RunFolder, step: int, *arguments: Any) -> None:
        if not torch.is_grad_enabled():
            steps.append(step)
        beat(run, step, *arguments)

    monkeypatch.setattr("lora_diffusion.training.trainer._HEARTBEAT_EVERY_S", 0.0)
    monkeypatch.setattr(RunFolder, "beat", counted)
    make_trainer(tmp_path, tiny_sd1).fit()
    assert steps == [2] * NUM_CALLS + [4] * NUM_CALLS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    count_passes(monkeypatch, without_gradients_s=3600.0)


@both_launches
@pytest.mark.usefixtures("clock")
def test_its_time_is_not_that_of_steps(tiny_sd1: Path, tmp_path: Path, launch: Launch) -> None:
    trainer = make_trainer(tmp_path, tiny_sd1, launch)
    trainer.fit()
    lines = read_metrics(trainer.run.metrics)
    assert [line["seconds"] for line in lines] == [1.0] * 4
    assert ["val_loss" in line for line in lines] == [False, True, False, True]


@pytest.mark.usefixtures("clock")
def test_its_time_is_not_that_of_steps_of_other_members(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_diffusion.recipe.launch_of", lambda *_: "quiet")  # a recording makes no further passes
    members = members_of(make_config(tmp_path, tiny_sd1, run=RUN, validation=VALIDATION), "run.seed=1,2")
    train_together(members, tmp_path / "sweep")
    for member in members:
        lines = read_metrics(RunFolder(member.config.run.output).metrics)
        assert len(lines) == 4
        assert all(1.0 <= line["seconds"] <= 2.0 for line in lines)  # one pass for both, or one for each


def test_that_one_picture_is_too_few_for_it_is_told(
    tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(count: int) -> list[str]:
        caplog.clear()
        pictures = draw_pictures(tmp_path / str(count), count)
        prepare(write_config(tmp_path / "run.toml", tiny_sd1, pictures, validation=VALIDATION))
        return [record.message for record in caplog.records if "validation.every" in record.message]

    (message,) = told(1)
    assert "validation.every is 2, but no picture can be kept out" in message
    assert told(2) == []


def test_it_leaves_every_module_in_its_mode(tiny_sd1: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_sd1)

    def in_training_mode() -> list[str]:
        return [name for name, module in trainer.loss.named_modules() if module.training]

    during: list[str] = []
    on_validation(trainer, lambda _: during.extend(in_training_mode()))
    before = in_training_mode()
    assert trainer.validator is not None
    trainer.validator.measure(trainer.loss, trainer.accelerator.device)
    assert in_training_mode() == before
    assert not any(name.startswith("model.") for name in during)
