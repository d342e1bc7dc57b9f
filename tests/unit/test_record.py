"""What a job leaves in its folder when it ends, also where nothing can be written."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from lora_diffusion.jobs.record import log_file, recorded_end
from lora_diffusion.runs import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.begin(0, 10)
    return run


def test_ctrl_c_has_stopped_a_run_and_is_no_fault(run: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), recorded_end(run, lambda error: error):
        raise KeyboardInterrupt
    assert (run.read_state().status, run.read_state().error) == ("stopped", None)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_error_that_ended_a_run_is_told_where_its_state_cannot_be_written(
    run: RunFolder, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(kind, match="the first"), recorded_end(run, lambda error: error):
        shutil.rmtree(run.path)
        raise kind("the first")
    assert f"{run.state_file}: it cannot be written" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_log_on_a_full_disk_neither_ends_a_run_nor_hides_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the first"), log_file(Path("/dev/full")):
        logging.getLogger("lora_diffusion").warning("it goes on")
        raise ValueError("the first")
    assert "Logging error" not in capsys.readouterr().err
