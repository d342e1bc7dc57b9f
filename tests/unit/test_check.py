"""What a check tells, and that it shares no GPU with a training, as its memory may not do for both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lora_diffusion import check as module
from lora_diffusion.check import check_run, render_report
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.jobs.device_lock import VARIABLE, device_lock
from lora_diffusion.workspace import Workspace
from tests.queues import toml
from tests.training_runs import draw_pictures, write_config
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


def test_what_a_check_warns_of_is_in_its_report(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path / "run.toml",
        tiny_sd1,
        draw_pictures(tmp_path / "pictures", 1),
        model={"configs": str(tiny_sd1)},
        dataset={"buckets": False, "resolution": 70},
        validation={"every": 5},
    )
    report = check_run(TrainConfig.load(config))

    told = json.loads(report.to_json())["warnings"]
    assert len(told) == 3
    assert told[0].startswith("model.configs is not used")
    assert "resolution 70x70 is trained at 64x64" in told[1]
    assert told[2].startswith("validation.every is 5, but no picture can be kept out")
    render_report(report)
    printed = capsys.readouterr().out
    assert "3 × warnings" in printed and "Nothing to mend" not in printed
