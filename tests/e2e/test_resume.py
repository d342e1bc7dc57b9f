"""A run that was interrupted, however rudely, ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.training_runs import draw_pictures, launch, prepare, tensor_hash, write_config

STEPS = 160
KILL_AFTER = 50
SAVE_EVERY = 20


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder / "run.toml", tiny_sd1, draw_pictures(folder / "pictures"), run={"steps": STEPS})
    return prepare(config).fit()


def _kill_at_step(process, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run never got to the step"
        time.sleep(0.02)
    # The launcher and the training process are one group: nobody gets a chance to clean up.
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_run_gives_the_same_adapter(
    tiny_sd1: Path, tmp_path: Path, uninterrupted: Path, workers: int
) -> None:
    pictures = uninterrupted.parent.parent / "pictures"
    run = {"steps": STEPS, "save_every": SAVE_EVERY, "loader_workers": workers}
    config = write_config(tmp_path / "run.toml", tiny_sd1, pictures, run=run)
    process = launch(config)
    _kill_at_step(process, tmp_path / "run" / "metrics.jsonl", KILL_AFTER)
    assert not (tmp_path / "run" / "test.safetensors").exists()

    resumed = prepare(config, resume=True)

    assert KILL_AFTER - SAVE_EVERY < resumed.step < STEPS
    assert tensor_hash(resumed.fit()) == tensor_hash(uninterrupted)


@pytest.mark.parametrize(("accumulation", "stops"), [(1, [1]), (1, [3, 7]), (4, [5]), (4, [1, 2, 9])])
def test_run_stopped_at_any_steps_gives_the_same_adapter(
    tiny_sd1: Path, tmp_path: Path, accumulation: int, stops: list[int]
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    run = {"steps": 12, "gradient_accumulation": accumulation, "keep_checkpoints": 5}
    whole = write_config(tmp_path / "whole.toml", tiny_sd1, pictures, run=run | {"output": str(tmp_path / "whole")})
    expected = tensor_hash(prepare(whole).fit())
    config = write_config(tmp_path / "parts.toml", tiny_sd1, pictures, run=run)
    for index, stop in enumerate(stops):
        _train_until(prepare(config, resume=index > 0), stop)
    assert tensor_hash(prepare(config, resume=True).fit()) == expected


def _train_until(trainer, step: int) -> None:
    """Ask for a stop as soon as `step` is done, as a signal would."""
    do_what_is_due = trainer.do_what_is_due

    def stop_when_due() -> None:
        do_what_is_due()
        if trainer.step == step:
            trainer.stop.reason = "test"

    trainer.do_what_is_due = stop_when_due
    trainer.fit()
    assert trainer.step == step


def test_global_random_state_has_no_influence(tiny_sd1: Path, tmp_path: Path) -> None:
    import random

    import numpy
    import torch

    pictures = draw_pictures(tmp_path / "pictures")
    hashes = []
    for seed in (1, 2):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        run = {"output": str(tmp_path / f"run{seed}")}
        config = write_config(tmp_path / f"{seed}.toml", tiny_sd1, pictures, run=run, preview={"prompts": ["a cat"]})
        hashes.append(tensor_hash(prepare(config).fit()))
    assert hashes[0] == hashes[1]
