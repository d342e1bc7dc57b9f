"""What is told about a base while it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lora_diffusion import recipe_base
from lora_diffusion.config import TrainConfig
from lora_diffusion.models.precision import multiplies_bf16
from lora_diffusion.recipe_base import load_base
from tests.training_runs import draw_pictures, write_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "has_units", "num_parameters", "is_told"),
    [("auto", True, 1, True), ("fp32", True, 1, False), ("auto", False, 1, False), ("auto", True, 10**9, False)],
    ids=["auto", "chosen", "no such processor", "small UNet"],
)
def test_who_leaves_fast_bfloat16_unused_by_auto_is_told(
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    has_units: bool,
    num_parameters: int,
    is_told: bool,
) -> None:
    monkeypatch.setattr(recipe_base, "multiplies_bf16", lambda device: has_units and device.type == "cpu")
    monkeypatch.setattr(recipe_base, "_LARGE_UNET", num_parameters)
    sections = {"run": {"precision": precision}}
    config = write_config(tmp_path / "run.toml", tiny_sd1, draw_pictures(tmp_path / "pictures"), **sections)
    with caplog.at_level(logging.INFO):
        load_base(TrainConfig.load(config), torch.float32, CPU)
    assert ('precision = "bf16"' in caplog.text) == is_told


def test_a_gpu_is_none_of_these_processors() -> None:
    assert not multiplies_bf16(torch.device("cuda"))
