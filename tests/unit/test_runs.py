"""A run folder is used by one process at a time, loses nothing, and tells the truth about its run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lora_diffusion.runs import Failure, RunFolder, RunFolderError, RunState, is_process


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "ink")


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def finish(run: RunFolder, *, status: str = "finished", checkpoint: bool = True) -> None:
    """Leave the folder as a run does that ended with `status` at step 5 of 10."""
    with run.lock():
        run.prepare()
        run.begin(0, 10)
        run.config.write_text("# config")
        run.adapter("ink").write_bytes(b"weights")
        run.metrics.write_text("{}")
        if checkpoint:
            (run.checkpoints / "000005").mkdir(parents=True)
        run.beat(5, 10, 0.25)
        run.end(status)  # pyright: ignore[reportArgumentType]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "run.lock" not in path.name}


# State


def test_a_folder_without_a_run_has_no_state(run: RunFolder) -> None:
    assert run.read_state() is None


def test_a_running_state_tells_step_speed_and_process(run: RunFolder) -> None:
    with run.lock():
        run.begin(0, 10)
        run.beat(3, 10, 0.5)
        state = run.read_state()

    assert state is not None
    assert (state.status, state.step, state.steps, state.seconds_per_step) == ("running", 3, 10, 0.5)
    assert state.pid == os.getpid()
    assert abs(state.heartbeat - time.time()) < 60


def test_a_failed_run_tells_why(run: RunFolder) -> None:
    failure = Failure("RunError", "loss is nan", "lower lr")
    with run.lock():
        run.begin(0, 10)
        run.beat(3, 10, 0.5)
        run.end("failed", failure)
    state = run.read_state()

    assert state is not None
    assert (state.status, state.step, state.error) == ("failed", 3, failure)


def test_a_running_state_whose_process_is_gone_reads_as_died(
    run: RunFolder, other_process: subprocess.Popen[bytes]
) -> None:
    with run.lock():
        run.begin(0, 10)
    started = psutil.Process(other_process.pid).create_time()
    written = json.loads(run.state_file.read_text())
    run.state_file.write_text(json.dumps(written | {"pid": other_process.pid, "process_start": started}))
    alive = run.read_state()
    other_process.kill()
    other_process.wait()
    dead = run.read_state()

    assert alive is not None and alive.status == "running"
    assert dead is not None and dead.status == "died"
    assert json.loads(run.state_file.read_text())["status"] == "running"  # reading changes nothing


def test_a_reused_pid_is_not_taken_for_the_run(run: RunFolder) -> None:
    with run.lock():
        run.begin(0, 10)
    written = json.loads(run.state_file.read_text())
    run.state_file.write_text(json.dumps(written | {"process_start": written["process_start"] - 100}))
    state = run.read_state()

    assert state is not None and state.status == "died"


def test_a_run_on_another_machine_is_taken_at_its_word_while_it_gives_one() -> None:
    state = RunState("running", pid=1, host="elsewhere", heartbeat=time.time() - 60)

    assert state.is_alive
    assert not replace(state, status="stopped").is_alive
    assert not replace(state, heartbeat=time.time() - 3600).is_alive


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"status": "sleeping"}', '{"status": "running", "step": "x"}'])
def test_a_damaged_state_file_is_named(run: RunFolder, text: str) -> None:
    run.path.mkdir(parents=True)
    run.state_file.write_text(text)

    with pytest.raises(RunFolderError, match=r"state\.json is damaged"):
        run.read_state()


# Control files


def test_each_request_is_taken_once(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.ask("save_now")
    run.ask("stop")
    (run.control / "unrelated").write_text("x")

    assert run.take_control() == {"stop": {}, "save_now": {}}
    assert run.take_control() == {}


def test_a_request_comes_with_its_content(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    run.ask("sample_now", {"prompts": ["a cat"], "seed": 3})

    assert run.take_control() == {"sample_now": {"prompts": ["a cat"], "seed": 3}}
    assert list(run.control.iterdir()) == []


def test_a_request_made_by_touch_is_one_and_a_malformed_one_is_passed_over(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    run.control.mkdir(parents=True)
    (run.control / "save_now").touch()
    assert run.take_control() == {"save_now": {}}

    for text in ("{", "[1]", '"x"', "\udcff", "[" * 100_000, '{"prompts": ' + '"x"' * 50_000):
        (run.control / "sample_now.json").write_text(text, errors="surrogateescape")
        (run.control / "stop").write_text(text, errors="surrogateescape")
        assert run.take_control() == {"stop": {}}  # a stop is a stop, whatever it says
    assert sum("sample_now.json is passed over" in record.message for record in caplog.records) == 6


def test_a_process_that_its_parent_has_not_noticed_to_be_gone_does_not_run() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        started = psutil.Process(process.pid).create_time()
        assert is_process(process.pid, started)
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert not is_process(process.pid, started)


def test_a_request_left_by_an_earlier_start_does_not_stop_the_next_one(run: RunFolder) -> None:
    finish(run, status="stopped")
    run.ask("stop")
    with run.lock():
        run.prepare(resume=True)

        assert run.take_control() == {}


# Lock


def test_a_second_process_is_told_who_uses_the_folder(run: RunFolder) -> None:
    script = (
        "from pathlib import Path; from lora_diffusion.runs import RunFolder\n"
        f"with RunFolder(Path({str(run.path)!r})).lock(): pass"
    )
    with run.lock():
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert f"in use by process {os.getpid()} on " in result.stderr
    assert "choose another folder with --set run.output=" in result.stderr
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0  # free again


def test_the_lock_of_a_killed_process_does_not_stay(run: RunFolder) -> None:
    script = (
        "import time; from pathlib import Path; from lora_diffusion.runs import RunFolder\n"
        f"with RunFolder(Path({str(run.path)!r})).lock(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunFolderError, match=f"process {process.pid} on "), run.lock():
            pass
        process.kill()
    with run.lock():
        assert run.prepare() is None


# Preparing


def test_a_run_folder_below_a_file_is_refused_with_the_file_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    for path in (tmp_path / "file" / "ink", tmp_path / "file"):
        with (
            pytest.raises(RunFolderError, match=r" cannot be written: .*/file is a file, not a folder"),
            RunFolder(path).lock(),
        ):
            pass


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="/proc cannot be written to even by root")
def test_a_run_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(RunFolderError, match="/proc/runs cannot be written"), RunFolder(Path("/proc/runs")).lock():
        pass


def test_a_nearly_full_disk_is_told_before_the_run(run: RunFolder) -> None:
    with run.lock(), pytest.raises(RunFolderError, match="disk is nearly full"):
        run.prepare(min_free_bytes=10**18)


def test_a_finished_run_moves_aside_whole_when_it_is_trained_again(run: RunFolder) -> None:
    finish(run)
    before = files_below(run.path)
    with run.lock():
        previous = run.prepare()

    assert previous is not None
    assert previous == run.path.with_name("ink-previous-1")
    assert files_below(previous) == before
    assert (previous / "ink.safetensors").read_bytes() == b"weights"
    assert files_below(run.path) == set()

    finish(run)
    with run.lock():
        assert run.prepare() == run.path.with_name("ink-previous-2")


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_an_unfinished_run_is_neither_moved_nor_overwritten_without_resume(run: RunFolder, status: str) -> None:
    finish(run, status=status)
    before = files_below(run.path)

    with (
        run.lock(),
        pytest.raises(RunFolderError, match=rf"unfinished run \({status} at step 5 of 10\)\. Add --resume"),
    ):
        run.prepare()
    assert files_below(run.path) == before
    with run.lock():
        assert run.prepare(resume=True) is None
    assert files_below(run.path) == before


def test_a_run_that_ended_before_its_first_checkpoint_moves_aside(run: RunFolder) -> None:
    finish(run, status="failed", checkpoint=False)
    with run.lock():
        assert run.prepare() == run.path.with_name("ink-previous-1")


def test_a_start_that_failed_before_its_first_result_is_repeated_in_place(run: RunFolder) -> None:
    with run.lock():
        run.prepare()
        run.begin(0, 10)
        run.config.write_text("# config")
        run.log.write_text("…")
        run.ask("stop")
        run.end("failed", Failure("DataError", "no such folder"))
    with run.lock():
        assert run.prepare() is None
        assert run.take_control() == {}

    assert [path.name for path in run.path.parent.iterdir()] == ["ink"]


def test_a_folder_with_other_files_is_refused(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    (run.path / "holiday.jpg").write_bytes(b"x")

    with run.lock(), pytest.raises(RunFolderError, match=r"holds no run \(holiday\.jpg"):
        run.prepare()
    assert (run.path / "holiday.jpg").exists()


def test_resuming_nothing_is_an_error_and_not_a_fresh_start(run: RunFolder) -> None:
    with run.lock(), pytest.raises(RunFolderError, match="holds no run"):
        run.prepare(resume=True)


def test_a_run_whose_damaged_state_was_deleted_is_kept_and_can_be_resumed(run: RunFolder) -> None:
    finish(run, status="stopped")
    run.state_file.write_text("{")
    with run.lock(), pytest.raises(RunFolderError, match="Delete this file"):
        run.prepare(resume=True)
    run.state_file.unlink()
    before = files_below(run.path)

    with run.lock(), pytest.raises(RunFolderError, match=r"unfinished run \(it has no state\.json\)\. Add --resume"):
        run.prepare()
    with run.lock():
        assert run.prepare(resume=True) is None
    assert files_below(run.path) == before
