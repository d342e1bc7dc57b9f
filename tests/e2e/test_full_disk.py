"""A full disk costs what cannot be written, and no step."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import RunError
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.tracking import MetricsFile, read_metrics
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training_run import run_training
from tests.sweeps import make_config, members_of, train_together
from tests.training_runs import draw_pictures, tensor_hash, write_config


def test_training_goes_on_while_state_and_metrics_cannot_be_written(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="lora_diffusion")
    pictures = draw_pictures(tmp_path / "pictures")

    def train(name: str) -> Path:
        config = write_config(tmp_path / f"{name}.toml", tiny_sd1, pictures, run={"output": str(tmp_path / name)})
        adapter = run_training(TrainConfig.load(config), resume=False)
        assert adapter is not None
        return adapter

    whole = train("whole")
    trainers: list[Trainer] = []
    begin, beat, write = Trainer.begin, RunFolder.beat, MetricsFile.write

    def begun(trainer: Trainer) -> None:
        trainers.append(trainer)
        begin(trainer)

    def on_full_disk(call):
        def called(*arguments: object) -> None:
            if trainers and trainers[0].step in (2, 3, 4):
                raise OSError(errno.ENOSPC, "No space left on device")
            call(*arguments)

        return called

    monkeypatch.setattr("lora_diffusion.training.trainer._HEARTBEAT_EVERY_S", 0.0)
    monkeypatch.setattr(Trainer, "begin", begun)
    monkeypatch.setattr(RunFolder, "beat", on_full_disk(beat))
    monkeypatch.setattr(MetricsFile, "write", on_full_disk(write))
    adapter = train("full")

    assert tensor_hash(adapter) == tensor_hash(whole)
    run = RunFolder(tmp_path / "full")
    assert (run.read_state().status, run.read_state().step) == ("finished", 6)
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 5, 6]
    assert caplog.text.count("No space left on device") == 1


def test_in_a_sweep_one_full_disk_is_told_and_the_other_members_go_on(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = RunFolder.end

    def on_full_disk(run: RunFolder, *arguments: object) -> None:
        if run.path.name == "run-seed1":
            raise OSError(errno.ENOSPC, "No space left on device")
        end(run, *arguments)

    monkeypatch.setattr(RunFolder, "end", on_full_disk)
    members = members_of(make_config(tmp_path, tiny_sd1, run={"steps": 3}), "run.seed=1,2")
    with pytest.raises(RunError, match=r"(?s)1 of 2 runs.*test-seed1: The disk is full .*--resume"):
        train_together(members, tmp_path / "sweep")

    first, second = (RunFolder(member.config.run.output) for member in members)
    assert first.adapter("test-seed1").exists()
    assert second.read_state().status == "finished"
