"""Stopping a run keeps its work."""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path

import psutil
import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.training_run import run_training
from tests.training_runs import draw_pictures, launch, prepare, write_config


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "control", "to all"])
def test_stopped_run_saves_and_exits_with_0(tiny_sd1: Path, tmp_path: Path, how: str) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"steps": 5000, "loader_workers": 2})
    process = launch(config)
    state = tmp_path / "run" / "state.json"
    deadline = time.monotonic() + 120
    while not state.exists() or json.loads(state.read_text()).get("step", 0) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    trainer = psutil.Process(json.loads(state.read_text())["pid"])
    if how == "control":
        (tmp_path / "run" / "control" / "stop").touch()
    elif how == "to all":  # as systemd, Slurm and the queue do
        workers = trainer.children()
        assert len(workers) == 2
        for member in (*workers, trainer):
            member.send_signal(signal.SIGTERM)
    else:
        trainer.send_signal(getattr(signal, how))
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 0, output
    stopped = RunFolder(tmp_path / "run").read_state()
    assert stopped.status == "stopped"
    assert 0 < stopped.step < 5000
    assert (tmp_path / "run" / f"test-{stopped.step:06d}.safetensors").exists()
    assert prepare(config, resume=True).step == stopped.step


PREVIEW = {"prompts": ["a red cat"], "steps": 2, "cfg": 1.0, "every": 0}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_the_model_is_loaded_stops_the_run_and_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, logger="lora_diffusion")

    def build(*_: object, **__: object) -> None:
        signal.raise_signal(getattr(signal, name))
        pytest.fail("it went on")

    monkeypatch.setattr("lora_diffusion.training_run.build", build)
    config = TrainConfig.load(write_config(tmp_path / "run.toml", tmp_path, tmp_path))
    assert run_training(config, resume=False) is None

    state = RunFolder(tmp_path / "run").read_state()
    assert (state.status, state.error) == ("stopped", None)
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "nothing was trained" in log and "Interrupt" not in log


def test_a_signal_after_the_last_step_costs_the_last_previews_and_nothing_else(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Trainer.finish

    def finish_asked(trainer: Trainer) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return finish(trainer)

    monkeypatch.setattr(Trainer, "finish", finish_asked)
    pictures = draw_pictures(tmp_path / "pictures")
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run={"steps": 3}, preview=PREVIEW)
    adapter = run_training(TrainConfig.load(config), resume=False)

    run = RunFolder(tmp_path / "run")
    assert (run.read_state().status, run.read_state().step) == ("finished", 3)
    assert adapter == run.adapter("test") and adapter.exists()
    assert {"README.md", "loss.png", "contact-sheet.png"} <= {path.name for path in run.path.iterdir()}
    assert [path.name for path in run.previews.iterdir()] == ["000000-0.png"]


def test_a_second_ctrl_c_ends_the_run_at_once_and_is_told_as_a_stop(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"))
    with pytest.raises(KeyboardInterrupt):
        run_training(TrainConfig.load(config), resume=False)

    state = RunFolder(tmp_path / "run").read_state()
    assert (state.status, state.error) == ("stopped", None)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_stop_is_obeyed_while_previews_are_drawn(tiny_sd1: Path, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    trainer = prepare(write_config(tmp_path / "run.toml", tiny_sd1, pictures, preview=PREVIEW))
    trainer.run.ask("stop")
    trainer.run.ask("save_now")
    trainer.fit()

    assert (trainer.step, trainer.stop.reason) == (0, "control/stop")
    assert not list(trainer.run.previews.iterdir())
    assert trainer.run.take_control() == {"save_now": {}}, "it is for the end of a step"
