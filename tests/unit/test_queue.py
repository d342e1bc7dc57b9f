"""The queue keeps its order and its promises, and never says what is not so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_captions import CaptionOrder
from lora_diffusion.config_errors import ConfigError
from lora_diffusion.jobs.queue import Queue, QueueError
from lora_diffusion.jobs.store import Store
from lora_diffusion.runs import RunFolder
from lora_diffusion.workspace import Workspace
from tests.queues import ROOT, Bench, bench, toml, wait_for


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as made:
        yield made


def order(queue: Queue) -> list[str]:
    return [job.name for job in queue.jobs() if job.status == "queued"]


# Adding


def test_an_added_job_waits_with_its_config_in_a_folder_of_its_own(work: Bench, tmp_path: Path) -> None:
    first, second = work.queue.add(toml()), work.queue.add(toml())

    assert (first.status, first.position, first.step, first.steps) == ("queued", 1, 0, 10)
    assert second.position == 2
    assert first.run == tmp_path / "runs" / "ink"
    assert second.run == tmp_path / "runs" / "ink-2"
    config = TrainConfig.parse(work.queue.config(second.id))
    assert (config.run.name, config.run.output) == ("ink", Path("runs/ink-2"))
    assert "# my run" in work.queue.config(second.id)


def test_a_folder_that_holds_something_is_passed_over(work: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")

    assert work.queue.add(toml(output="elsewhere")).run == tmp_path / "elsewhere-2"
    assert work.queue.add(toml(output="other")).run == tmp_path / "other"
    assert work.queue.add(toml(output=str(tmp_path / "third"))).run == tmp_path / "third"


def test_a_given_name_takes_the_place_of_the_configs(work: Bench) -> None:
    job = work.queue.add(toml(), name="neon")

    assert (job.name, job.run.name) == ("neon", "neon")
    assert TrainConfig.parse(work.queue.config(job.id)).run.name == "neon"


def test_a_wrong_config_leaves_nothing_behind(work: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stepz"):
        work.queue.add(toml().replace("steps", "stepz"))

    assert work.queue.jobs() == []
    assert list(tmp_path.iterdir()) == []


def _add_some(root: Path) -> None:
    queue = Queue(Workspace(root), start_runner=lambda _: None)
    for _ in range(5):
        queue.add(toml())


def test_processes_that_add_at_once_get_a_folder_and_a_place_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_some, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    jobs = Queue(Workspace(tmp_path)).jobs()

    assert [process.exitcode for process in processes] == [0] * 4
    assert [job.position for job in jobs] == list(range(1, 21))
    assert len({job.run for job in jobs}) == 20


def test_a_process_waits_for_the_one_that_makes_the_database(work: Bench) -> None:
    database = work.queue.workspace.queue
    database.parent.mkdir(parents=True)
    with closing(sqlite3.connect(database, isolation_level=None, check_same_thread=False)) as maker:
        maker.execute("BEGIN IMMEDIATE")
        done = threading.Timer(0.3, maker.execute, ["COMMIT"])
        done.start()
        job = work.queue.add(toml(), start=False)
        done.join()

    assert [added.id for added in work.queue.jobs()] == [job.id]


# Order


def test_jobs_can_be_moved(work: Bench) -> None:
    ids = [work.queue.add(toml(name)).id for name in "abcd"]
    work.queue.move(ids[3], 2)
    assert order(work.queue) == ["a", "d", "b", "c"]
    work.queue.move(ids[0], 99)
    assert order(work.queue) == ["d", "b", "c", "a"]
    work.queue.cancel(ids[1])

    assert order(work.queue) == ["d", "c", "a"]
    assert work.queue.job(ids[1]).status == "cancelled"
    with pytest.raises(QueueError, match="does not wait"):
        work.queue.move(ids[1], 1)


def test_jobs_run_one_after_the_other_in_their_order(work: Bench) -> None:
    first, second = work.queue.add(toml("a")), work.queue.add(toml("b", steps=50))
    work.queue.move(second.id, 1)
    work.work_until(second.id, "starting", "running")
    assert work.queue.job(first.id).status == "queued"
    work.work_until(first.id, "finished")

    before, after = work.queue.job(second.id), work.queue.job(first.id)
    assert (before.status, before.step, before.error) == ("finished", 50, None)
    assert before.ended is not None and after.started is not None
    assert before.created <= before.started <= before.ended <= after.started  # pyright: ignore[reportOptionalOperand]


# Pausing, stopping, resuming


def test_a_paused_job_lets_the_next_one_run_and_resumes_where_it_was_before_all_others(work: Bench) -> None:
    long = work.queue.add(toml("long", steps=60)).id
    work.work_until_step(long, 3)
    short, last = work.queue.add(toml("short", steps=50)).id, work.queue.add(toml("last", steps=5)).id
    work.queue.pause(long)
    work.queue.pause(long)  # two tabs
    paused = work.work_until(long, "paused")
    assert 3 <= paused.step < 60
    assert RunFolder(paused.run).has_checkpoint
    work.work_until(short, "starting", "running")
    work.queue.resume(long)
    assert order(work.queue) == ["long", "last"]
    done = work.work_until(last, "finished")

    assert work.queue.job(long).status == "finished"
    assert work.queue.job(long).ended < done.started + 60  # pyright: ignore[reportOptionalOperand]
    steps = [line for line in RunFolder(paused.run).metrics.read_text().splitlines()]
    assert len(steps) == 60  # nothing was trained twice


def test_a_job_whose_state_was_deleted_resumes_where_it_was(work: Bench) -> None:
    id = work.queue.add(toml(steps=30)).id
    work.work_until_step(id, 6)
    work.queue.stop(id)
    run = RunFolder(work.work_until(id, "stopped").run)
    run.state_file.unlink()
    work.queue.resume(id)
    work.work_until(id, "finished")

    steps = run.metrics.read_text().splitlines()
    assert len(steps) == 30  # nothing was trained twice


def test_a_stopped_job_is_not_taken_up_again_by_itself(work: Bench) -> None:
    id = work.queue.add(toml(steps=100)).id
    work.work_until_step(id, 3)
    work.queue.stop(id)
    work.work_until(id, "stopped")
    for _ in range(5):
        work.runner.turn()

    assert work.queue.job(id).status == "stopped"
    work.queue.retry(id)
    assert work.work_until(id, "finished").step == 100


def test_a_job_that_waits_can_be_paused(work: Bench) -> None:
    id = work.queue.add(toml()).id
    work.queue.pause(id)
    assert work.queue.job(id).status == "paused"
    assert not work.runner.turn()
    work.queue.resume(id)
    work.work_until(id, "finished")


def test_a_job_stopped_while_it_starts_stops(work: Bench) -> None:
    id = work.queue.add(toml(steps=2000)).id
    work.work_until(id, "starting", "running")  # the latter if this process was kept from looking in time
    work.queue.stop(id)

    assert work.work_until(id, "stopped").step < 2000


def test_a_pause_that_is_taken_back_while_the_run_still_ends_goes_on(work: Bench) -> None:
    id = work.queue.add(toml(steps=30)).id
    work.work_until_step(id, 3)
    work.queue.pause(id)
    work.queue.resume(id)

    assert work.work_until(id, "finished").step == 30


def test_a_training_that_does_not_react_is_ended_by_force(tmp_path: Path) -> None:
    with bench(tmp_path, grace_s=0.1, end_after_s=0.1, kill_after_s=0.1) as work:
        id = work.queue.add(toml(how="deaf")).id
        work.work_until_step(id, 2)
        work.queue.stop(id)
        job = work.work_until(id, "interrupted")

    assert job.error is not None and "was ended by force at step 2 of 10" in job.error.message
    assert job.step == 2


# Failing


def test_a_training_that_is_killed_is_interrupted_and_says_so(work: Bench) -> None:
    id = work.queue.add(toml(steps=60)).id
    other = work.queue.add(toml("other", steps=5)).id
    work.work_until_step(id, 6)
    work.process(id).send_signal(signal.SIGKILL)
    work.work_until(other, "finished")
    job = work.queue.job(id)

    assert job.status == "interrupted"
    assert job.error is not None
    assert "ended by signal 9 (SIGKILL) at step" in job.error.message
    assert "continues from the newest checkpoint" in job.error.hint
    work.queue.resume(id)
    assert work.work_until(id, "finished").step == 60


def test_a_failed_run_tells_why_and_is_not_tried_again_by_itself(work: Bench) -> None:
    broken, nan = work.queue.add(toml(how="broken")).id, work.queue.add(toml("nan", how="nan")).id
    work.work_until(nan, "failed")
    for _ in range(5):
        work.runner.turn()

    errors = [work.queue.job(id).error for id in (broken, nan)]
    assert [work.queue.job(id).status for id in (broken, nan)] == ["failed", "failed"]
    assert [error and error.message for error in errors] == ["data/broken is not a folder.", "the loss is nan"]
    assert [entry.attempt for entry in Store(work.queue.workspace.queue).entries()] == [1, 1]
    (work.queue.workspace.root / "broken").mkdir()
    work.queue.retry(broken)
    assert work.work_until(broken, "finished").error is None


def test_a_program_that_cannot_be_started_fails_the_job(work: Bench) -> None:
    work.runner.commands = {"train": lambda config, resume: ["/no/such/program"]}
    id = work.queue.add(toml()).id
    job = work.work_until(id, "failed")

    assert job.error is not None and "/no/such/program cannot be started" in job.error.message


def test_a_start_that_fails_without_a_message_of_ours_tells_the_line_that_says_why(work: Bench) -> None:
    accelerate = (
        "\nTraceback (most recent call last):\n  File\nsubprocess.CalledProcessError: Command '[…]' returned 1."
    )
    output = (
        f"Traceback (most recent call last):\n  import torch\nModuleNotFoundError: No module named 'torch'{accelerate}"
    )
    work.runner.commands = {"train": lambda config, resume: [sys.executable, "-c", f"print({output!r}); exit(1)"]}
    job = work.work_until(work.queue.add(toml()).id, "failed")

    assert job.error is not None
    assert job.error.message == "ModuleNotFoundError: No module named 'torch'"


def test_what_cannot_be_done_is_refused_with_the_reason(work: Bench) -> None:
    id = work.queue.add(toml()).id
    work.work_until(id, "finished")

    with pytest.raises(QueueError, match=r"is finished\. Duplicate it"):
        work.queue.resume(id)
    with pytest.raises(QueueError, match="There is no job 99"):
        work.queue.pause(99)
    work.queue.pause(id)  # an ended job is already what was asked for
    assert work.queue.job(id).status == "finished"


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    queue = Queue(Workspace(tmp_path))
    queue.workspace.private.mkdir()
    queue.workspace.queue.write_bytes(b"not a database, but long enough to be looked at as one" * 100)

    with pytest.raises(QueueError, match=r"queue\.sqlite cannot be used.*delete it"):
        queue.jobs()


# Runs from a terminal, duplicates, forgetting


def test_a_run_from_a_terminal_is_listed_and_can_be_taken_into_the_queue(work: Bench, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "mine")
    with run.lock():
        run.begin(0, 20)
        run.beat(5, 20, 0.1)
        run.config.write_text(toml("mine", steps=20))
        (run.checkpoints / "000005").mkdir(parents=True)
        running = work.queue.jobs()
        run.end("stopped")
    stopped = work.queue.jobs()

    assert [(job.name, job.status, job.step) for job in running] == [("mine", "running", 5)]
    assert running[0].id < 0
    assert [(job.id, job.status) for job in stopped] == [(running[0].id, "stopped")]
    work.queue.resume(running[0].id)
    (job,) = work.queue.jobs()
    assert (job.id > 0, job.status, job.run) == (True, "queued", run.path)
    work.queue.resume(running[0].id)  # another tab, which has not looked since
    assert [job.id for job in work.queue.jobs()] == [job.id]
    assert work.work_until(job.id, "finished").step == 20


def test_what_a_start_without_a_checkpoint_left_is_moved_aside_and_not_listed(work: Bench) -> None:
    id = work.queue.add(toml(steps=30)).id
    work.work_until_step(id, 1)
    work.process(id).kill()
    run = RunFolder(work.work_until(id, "interrupted").run)
    for checkpoint in run.checkpoints.glob("*"):
        checkpoint.rmdir()
    work.queue.resume(id)
    work.work_until(id, "finished")

    assert run.path.with_name("ink-previous-1").is_dir()
    assert [job.id for job in work.queue.jobs()] == [id]


def test_a_forgotten_job_is_off_the_list_until_its_folder_is_used_again(work: Bench) -> None:
    job = work.queue.add(toml())
    work.work_until(job.id, "finished")
    work.queue.forget(job.id)
    assert work.queue.jobs() == []
    assert RunFolder(job.run).adapter("ink").exists()
    RunFolder(job.run).end("finished")

    assert [job.status for job in work.queue.jobs()] == ["finished"]


def test_a_duplicate_has_a_free_name_and_no_folder_yet(work: Bench) -> None:
    id = work.queue.add(toml(output="runs/special")).id
    copy = work.queue.duplicate(id)
    added = work.queue.add(copy)

    assert "# my run" in copy
    assert (added.name, added.run.name) == ("ink-2", "ink-2")
    assert TrainConfig.parse(work.queue.duplicate(id)).run.name == "ink-3"


# The runner


def test_there_is_one_runner_and_it_leaves_when_there_is_nothing_to_do(work: Bench) -> None:
    work.runner.idle_s = 0.3
    other = Queue(work.queue.workspace, start_runner=lambda _: None)
    id = other.add(toml()).id
    started = time.monotonic()
    work.runner.run()

    assert other.job(id).status == "finished"
    assert time.monotonic() - started < 20


def test_a_new_runner_takes_over_the_training_of_one_that_is_gone(work: Bench) -> None:
    id = work.queue.add(toml(steps=100)).id
    work.work_until_step(id, 3)
    pid = work.process(id).pid
    with bench(work.queue.workspace.root) as successor:
        successor.runner.turn()
        assert successor.queue.job(id).status == "running"
        assert successor.process(id).pid == pid
        successor.queue.pause(id)
        successor.work_until(id, "paused")


def test_new_jobs_are_held_back_for_as_long_as_the_process_lives_that_wants_it(work: Bench, tmp_path: Path) -> None:
    holds = f"Queue(Workspace(Path({str(tmp_path)!r}))).hold_new(); print('held', flush=True); time.sleep(60)"
    imports = "import time; from pathlib import Path; from lora_diffusion.jobs.queue import Queue"
    code = f"{imports}; from lora_diffusion.workspace import Workspace; {holds}"
    before = work.queue.add(toml("before")).id
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        after = work.queue.add(toml("after")).id
        work.work_until(before, "finished")
        wait_for(lambda: not work.runner.turn())
        assert work.queue.job(after).status == "queued"
        process.kill()
    work.work_until(after, "finished")


def test_a_job_whose_runner_died_before_it_started_anything_is_started_by_the_next(work: Bench) -> None:
    id = work.queue.add(toml()).id
    taken = Store(work.queue.workspace.queue).take_next()

    assert taken is not None and taken.id == id
    assert work.queue.job(id).status == "queued"
    work.work_until(id, "finished")


def test_a_trainer_that_nobody_wrote_down_is_found_and_not_started_twice(work: Bench) -> None:
    id = work.queue.add(toml(steps=50)).id
    work.work_until(id, "starting", "running")
    Store(work.queue.workspace.queue).change(id, launcher_pid=None, launcher_start=None)
    with bench(work.queue.workspace.root) as successor:
        successor.work_until(id, "finished")

    assert [entry.attempt for entry in Store(work.queue.workspace.queue).entries()] == [1]
    assert len(RunFolder(work.queue.job(id).run).metrics.read_text().splitlines()) == 50


def test_the_database_stays_whole_while_many_write(work: Bench) -> None:
    id = work.queue.add(toml()).id
    for position in range(50):
        work.queue.move(id, position)
    with sqlite3.connect(work.queue.workspace.queue) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_no_child_of_the_runner_stays_a_zombie(work: Bench) -> None:
    id = work.queue.add(toml()).id
    work.work_until(id, "finished")
    state = RunFolder(work.queue.job(id).run).read_state()
    assert state is not None and state.pid != os.getpid(), "there was a child"

    def has_none() -> bool:
        work.runner.turn()
        return all(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children(recursive=True))

    wait_for(has_none, 5)


def test_a_queue_of_an_earlier_version_is_read_with_its_runs(work: Bench, tmp_path: Path) -> None:
    job = work.queue.add(toml(), start=False)
    with closing(sqlite3.connect(Workspace(tmp_path).queue)) as database:
        database.execute("ALTER TABLE jobs DROP COLUMN kind")

    assert [(old.id, old.kind, old.name) for old in work.queue.jobs()] == [(job.id, "train", "ink")]
    captioning = work.queue.add_captions(CaptionOrder.of(folder="data/shapes", captioner="models/blip"))
    assert [(new.kind, new.position) for new in work.queue.jobs()] == [("train", 1), ("caption", 2)]
    with pytest.raises(QueueError, match="is no training"):
        work.queue.duplicate(captioning.id)
