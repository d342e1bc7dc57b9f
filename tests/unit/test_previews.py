"""Pictures asked for while training are drawn from the weights of that moment and change nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.generation.infotext import read_png
from lora_diffusion.training.trainer import Trainer
from tests.training_runs import draw_pictures, prepare, tensor_hash, write_config

PREVIEW = {"steps": 2, "cfg": 3.0, "size": 32, "negative": "blurry"}


def trainer_of(base: Path, folder: Path) -> Trainer:
    folder.mkdir()
    config = write_config(folder / "run.toml", base, draw_pictures(folder / "pictures"), preview=PREVIEW)
    return prepare(config)


def test_asked_pictures_say_what_they_show_and_the_adapter_is_the_same(tiny_sd1: Path, tmp_path: Path) -> None:
    undisturbed = trainer_of(tiny_sd1, tmp_path / "a").fit()
    trainer = trainer_of(tiny_sd1, tmp_path / "b")
    trainer.run.ask("sample_now", {"prompts": ["a red cat", "a blue cat"], "seed": 5, "steps": 3, "cfg": 1})
    adapter = trainer.fit()

    drawn = sorted(path.name for path in trainer.run.previews.iterdir())
    assert drawn == ["now-000001-0.png", "now-000001-1.png"]  # the config has no prompts of its own
    requests = [read_png(trainer.run.previews / name).request for name in drawn]
    assert [(request.prompt, request.seed) for request in requests] == [("a red cat", 5), ("a blue cat", 6)]
    assert {(request.steps, request.cfg, request.size, request.negative) for request in requests} == {
        (3, 1.0, (32, 32), "blurry")
    }
    assert tensor_hash(adapter) == tensor_hash(undisturbed)


@pytest.mark.parametrize(
    "content",
    [
        {"prompts": "a cat"},
        {"prompts": []},
        {"prompts": [1]},
        {"prompts": ["x"] * 17},
        {"prompts": ["x"], "seed": "1"},
        {"prompts": ["x"], "seed": True},
        {"prompts": ["x"], "seed": -1},
        {"prompts": ["x"], "steps": 10**9},
        {"prompts": ["x"], "steps": 0},
        {"prompts": ["x"], "cfg": 0.5},
        {"prompts": ["<lora:neon:1>"]},
        {"seed": 1},
        {"prompt": "a cat"},
    ],
)
def test_what_cannot_be_drawn_is_told_and_the_training_goes_on(
    trainer: Trainer, caplog: pytest.LogCaptureFixture, content: dict[str, Any]
) -> None:
    trainer.run.ask("sample_now", content)
    with caplog.at_level(logging.WARNING, "lora_diffusion"):
        trainer._obey_control_files()

    assert [record.message for record in caplog.records if "could not be drawn" in record.message] != []
    assert not trainer.run.previews.exists()


@pytest.fixture(scope="module")
def trainer(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trainer_of(tiny_sd1, tmp_path_factory.mktemp("previews") / "run")
