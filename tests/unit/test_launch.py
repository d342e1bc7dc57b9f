"""Threads spin briefly; several CPU processes are started, or it is an error: never one in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_diffusion import launch
from lora_diffusion.launch import is_incomplete, num_processes_of

LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}


def test_a_process_without_a_rank_among_several_is_incomplete() -> None:
    assert is_incomplete(LAUNCHED)


@pytest.mark.parametrize(
    "environment",
    [{}, {"ACCELERATE_USE_CPU": "True"}, LAUNCHED | {"RANK": "0"}, LAUNCHED | {"ACCELERATE_USE_CPU": "False"}],
)
def test_a_single_process_and_a_ranked_one_are_complete(environment: dict[str, str]) -> None:
    assert not is_incomplete(environment)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("accelerate launch --cpu --num_processes 2 train.py", 2),
        ("accelerate launch --cpu --num-processes=3 --num_machines 1 train.py", 3),
        ("accelerate launch --cpu train.py", None),
        ("accelerate launch --cpu --num_processes 4 --num_machines 2 train.py", None),
        ("accelerate launch --num_processes", None),
    ],
)
def test_the_number_of_processes_is_read_from_the_command_line(words: str, count: int | None) -> None:
    assert num_processes_of(words.split()) == count


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch has on Linux")
def test_threads_of_torch_soon_sleep_while_they_wait() -> None:
    code = "from lora_diffusion.launch import spin_briefly; spin_briefly(); import torch"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )

    assert "GOMP_SPINCOUNT = '20000'" in process.stderr or "GOMP_SPINCOUNT = '3000'" in process.stderr


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="asks Linux")
def test_a_program_that_keeps_a_core_busy_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.5)
        seen = min(launch._num_running() for _ in range(5))
        busy.kill()

    assert seen >= 2  # it, and who asks


@pytest.mark.parametrize(
    ("running", "threads", "are_wanted"),
    [
        ([1, 1, 1, 1, 1], "", False),
        ([2, 2, 3, 2, 2], "", True),
        ([2, 1, 2, 2, 2], "", False),  # what wakes up for a moment is not busy
        ([2, 2, 2, 2, 2], "3", False),  # one of four cores is left
        ([3, 3, 3, 3, 3], "3", True),
        ([9, 9, 9, 9, 9], "1", False),  # one thread waits for nobody
    ],
)
def test_cores_are_wanted_if_others_need_more_than_is_left(
    monkeypatch: pytest.MonkeyPatch, running: list[int], threads: str, are_wanted: bool
) -> None:
    counts = iter(running)
    monkeypatch.setattr(launch, "_num_running", lambda: next(counts))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)

    assert launch.cores_are_wanted() is are_wanted


def output_of(code: str) -> str:
    """What a new process prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def test_a_process_ends_without_looking_through_its_objects() -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"  # runs last
        "from lora_diffusion.launch import end_quickly; end_quickly(); objects = [[] for _ in range(5000)]"
    )
    assert int(output_of(code)) > 5000


def test_what_imports_make_is_never_looked_through_and_later_garbage_still_is() -> None:
    code = (
        "import gc, weakref; from lora_diffusion.launch import lasting_imports\n"
        "seen = []; gc.callbacks.append(lambda phase, info: seen.append(phase))\n"
        "with lasting_imports(): made = [[] for _ in range(100_000)]\n"
        "print(len(seen), gc.get_freeze_count() > 100_000, gc.isenabled(), len(gc.get_objects()) < 1000)\n"
        "class Cycle: pass\n"
        "cycle = Cycle(); cycle.own = cycle; known = weakref.ref(cycle); del cycle; gc.collect()\n"
        "count = gc.get_freeze_count()\n"
        "with lasting_imports(): more = [[] for _ in range(100)]\n"
        "print(known(), gc.get_freeze_count() - count)"
    )
    assert output_of(code).split() == ["0", "True", "True", "True", "None", "0"]
