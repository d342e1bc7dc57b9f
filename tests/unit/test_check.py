"""A check and a training do not share a GPU, whose memory may not do for both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_diffusion import check as module
from lora_diffusion.check import check_run
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.device_lock import VARIABLE, device_lock
from lora_diffusion.workspace import Workspace
from tests.queues import toml
from webui.services import preflight


def test_a_check_says_who_has_the_gpu_and_loads_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "{device}.lock"))
    monkeypatch.setattr(module, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)

    with (
        device_lock(tmp_path / "cuda-0.lock", "the training of neon"),
        pytest.raises(UserError, match=r"in use \(the training of neon, process \d+\).*Check again when it is free"),
    ):
        check_run(TrainConfig.parse(toml()))


def test_a_check_on_a_cpu_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "{device}.lock"))

    with device_lock(tmp_path / "cpu.lock", "a training"), pytest.raises(UserError, match="base"):
        check_run(TrainConfig.parse(toml(device="cpu")))


def test_the_check_of_the_web_ui_is_told_of_the_workspaces_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"import json, os; print(json.dumps({{'lock': os.environ['{VARIABLE}']}}))"
    monkeypatch.setattr(preflight, "COMMAND", (sys.executable, "-c", script))

    told = preflight.check(Workspace(tmp_path), toml()).report

    assert told == {"lock": str(Workspace(tmp_path).lock("{device}"))}
