"""What the page of a run offers after it ran out of memory."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.jobs.queue import Job, Queue
from lora_diffusion.runs import Failure, RunFolder
from lora_diffusion.training_run import _out_of_memory
from lora_diffusion.workspace import Workspace
from webui.services.remedy import remedy_of

TOML = (
    '[run]\nname = "big"\nsteps = 9\nbatch_size = 3\ngradient_accumulation = 2\n[model]\npath = "b"\n'
    'gradient_checkpointing = false\n[[dataset]]\npath = "d"\n'
)


@pytest.fixture()
def queue(tmp_path: Path) -> Queue:
    return Queue(Workspace(tmp_path), start_runner=lambda _: None)


def failed(queue: Queue, toml: str, message: str | None = None) -> Job:
    run = RunFolder(queue.workspace.runs / "big")
    run.path.mkdir(parents=True)
    run.prepare(resume=False)
    run.config.write_text(toml.replace('name = "big"', f'name = "big"\noutput = "{run.path}"'))
    run.begin(1, 9)
    run.end("failed", Failure("RunError", message or str(_out_of_memory(run))))
    (job,) = queue.jobs()
    return job


def test_checkpointing_comes_first_as_it_changes_no_result(queue: Queue) -> None:
    remedy = remedy_of(queue, failed(queue, TOML))

    assert remedy is not None
    assert remedy.changes == {"model.gradient_checkpointing": ("false", "true")}
    expected = tomllib.loads(TOML.replace("false", "true"))
    assert TrainConfig.parse(remedy.toml).run.name == "big-2"
    assert tomllib.loads(remedy.toml.replace("big-2", "big")) == expected


def test_then_one_picture_at_a_time_with_as_many_per_step(queue: Queue) -> None:
    remedy = remedy_of(queue, failed(queue, TOML.replace("false", "true")))

    assert remedy is not None
    assert remedy.changes == {"run.batch_size": ("3", "1"), "run.gradient_accumulation": ("2", "6")}
    assert (run := TrainConfig.parse(remedy.toml).run) and (run.batch_size, run.gradient_accumulation) == (1, 6)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (TOML.replace("false", "true").replace("batch_size = 3", "batch_size = 1"), None),
        (TOML, "the loss is nan"),
        ("no config", None),
    ],
)
def test_there_is_none_where_nothing_is_left_or_memory_was_not_the_reason(
    queue: Queue, toml: str, message: str | None
) -> None:
    assert remedy_of(queue, failed(queue, toml, message)) is None
