"""One process at a time uses the device, and those who wait are told whom they wait for."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lora_diffusion.jobs.device_lock import NoLongerWanted, device_lock, holder_of, lock_from_environment

HOLD = """
import sys, time
from pathlib import Path
from lora_diffusion.jobs.device_lock import device_lock
with device_lock(Path(sys.argv[1]), "the training of neon"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_waits_is_told_for_whom_and_gets_the_device_when_that_process_dies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "private" / "cpu.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        asked = 0

        def kill_at_the_second_question() -> bool:
            nonlocal asked
            asked += 1
            if asked == 2:
                process.kill()
            return False

        with (
            caplog.at_level(logging.INFO, "lora_diffusion"),
            device_lock(path, "the training of ink", kill_at_the_second_question),
        ):
            assert "the training of ink" in holder_of(path)

    waiting = [record.message for record in caplog.records if "waiting for the device" in record.message]
    assert waiting == [f"waiting for the device (used by the training of neon, process {process.pid})"]


def test_waiting_ends_when_it_is_no_longer_wanted(tmp_path: Path) -> None:
    path = tmp_path / "cpu.lock"
    with device_lock(path, "this"), pytest.raises(NoLongerWanted), device_lock(path, "that", lambda: True):
        pytest.fail("two held the device")
    with device_lock(path, "that"):
        pass  # free again
    assert holder_of(path) == "another process"


def test_the_environment_names_the_lock_of_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_DIFFUSION_DEVICE_LOCK", raising=False)
    assert lock_from_environment("cpu") is None
    monkeypatch.setenv("LORA_DIFFUSION_DEVICE_LOCK", "/w/{device}.lock")
    assert lock_from_environment("cuda-0") == Path("/w/cuda-0.lock")
    monkeypatch.setenv("LORA_DIFFUSION_DEVICE_LOCK", "/w/cpu.lock")
    assert lock_from_environment("cuda-0") == Path("/w/cpu.lock")
