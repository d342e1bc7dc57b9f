"""Threads spin briefly; several CPU processes are started, or it is an error: never one in silence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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

    assert "GOMP_SPINCOUNT = '10000'" in process.stderr


def test_a_process_ends_without_looking_through_its_objects() -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"  # runs last
        "from lora_diffusion.launch import end_quickly; end_quickly(); objects = [[] for _ in range(5000)]"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    assert int(process.stdout) > 5000
