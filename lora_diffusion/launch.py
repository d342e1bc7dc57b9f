"""What a process needs before it imports torch, and what `accelerate launch` leaves undone on CPUs. No torch."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from lora_diffusion.errors import UserError
from lora_diffusion.models.heap import uncollected

_LOOKS, _BETWEEN_LOOKS_S = 5, 0.01


def spin_briefly() -> None:
    """Let threads of this process soon sleep while they wait for each other. Call it before torch is imported.

    GNU's OpenMP spins 300,000 rounds by default. Where other programs want the cores too, that keeps the very threads
    from running that are waited for. To wake a thread that sleeps takes long, too, on a virtual machine above all: its
    price is what a step with nothing beside shows. Two threads on two cores of Intel Xeon (Sapphire Rapids or later),
    torch 2.13, a step of SD 1.5 at 256 px in bf16, and seconds of one of a base of 1/25 of its weights:

    | rounds | SD 1.5, of 10,000's time | the small base, fp32 | the small base, bf16, beside one busy program |
    | --- | --- | --- | --- |
    | 3,000 | 1.09 | 0.147 | 0.3 to 0.5 |
    | 10,000 | 1 | 0.120 | 0.8 |
    | 20,000 | 0.97 | 0.112 | 0.8 to 1.2 |
    | 100,000 | 0.95 | - | 1.7 to 3.5 |
    | 300,000 | 0.96 | 0.116 | 1.8 to 3.8 |
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000" if cores_are_wanted() else "20000")


def cores_are_wanted() -> bool:
    """Whether programs beside this one keep more cores busy now than its threads leave free. False where unknown."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    num_threads = int(wanted) if wanted.isdecimal() else ours
    free = (os.cpu_count() or 1) - num_threads
    return num_threads > 1 and min(_num_running() for _ in range(_LOOKS)) - 1 > free


def _num_running() -> int:
    """How many threads of the whole machine run or wait for a core, this one included."""
    time.sleep(_BETWEEN_LOOKS_S)  # a program that is only just waking up is not one that keeps a core
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Inside, modules are imported: Python does not look for garbage meanwhile, nor later among what is there by then.

    torch, diffusers and transformers make a million objects that stay. To look through all of them takes 0.1 to 0.5 s,
    and happens five times before a training has ended its first steps. Only the first time in a process: what is
    garbage already would stay, too.
    """
    if gc.get_freeze_count():
        yield
        return
    with uncollected():
        yield
        gc.freeze()


def end_quickly() -> None:
    """Let this process end without a last look through all objects for garbage.

    Where torch, diffusers and transformers are imported that takes more than a second, and frees nothing that the end
    of the process would not free.
    """
    atexit.register(gc.freeze)


def complete_cpu_launch() -> None:
    """Start the processes that `accelerate launch --cpu --num_processes 2` was asked for, in place of this one.

    Without MPI accelerate (1.15) starts a single process then and says nothing: the run would train half of each batch.
    torchrun starts them all; they talk through gloo. Raises UserError where it cannot (several machines).
    """
    if not is_incomplete(os.environ):
        return
    launcher = psutil.Process().parent()
    count = num_processes_of(launcher.cmdline() if launcher else [])
    if count is None:
        raise UserError(
            "accelerate launch started one CPU process although several were asked for. Start them with "
            "torchrun --nproc-per-node 2 train.py --config …"
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *sys.argv]
    os.execv(sys.executable, command)


def is_incomplete(environment: Mapping[str, str]) -> bool:
    """Whether the launcher was asked for several CPU processes and this is the only one: it has no rank."""
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return (
        environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "MASTER_ADDR" in environment
        and not any(name in environment for name in ranks)
    )


def num_processes_of(command: Sequence[str]) -> int | None:
    """The `--num_processes` of an `accelerate launch` command line; None if it has none, or speaks of machines."""
    values: dict[str, str] = {}
    for position, word in enumerate(command):
        name, equals, value = word.replace("-", "_").partition("=")
        if name in ("__num_processes", "__num_machines"):
            values[name] = value if equals else command[position + 1] if position + 1 < len(command) else ""
    if values.get("__num_machines", "1") != "1" or not values.get("__num_processes", "").isdecimal():
        return None
    return int(values["__num_processes"])
