"""What a process needs before it imports torch, and what `accelerate launch` leaves undone on CPUs. No torch."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Mapping, Sequence

import psutil

from lora_diffusion.errors import UserError


def spin_briefly() -> None:
    """Let threads of this process soon sleep while they wait for each other. Call it before torch is imported.

    GNU's OpenMP spins 300,000 rounds by default, a millisecond or more. Where other programs want the cores too, that
    keeps the very threads from running that are waited for: beside four busy programs on two cores of AMD EPYC, steps
    of the quickstart took 8 s or more each, and 1.9 s with 3,000 rounds. To wake a thread that sleeps takes long, too,
    on a virtual machine above all. Steps with two threads of Intel Xeon (Sapphire Rapids or later), nothing beside:

    | rounds | SD 1.5, 256 px, bf16 | a base of 1/25 of its weights, fp32 |
    | --- | --- | --- |
    | 3,000 | 0.72 s | 0.147 s |
    | 10,000 | 0.66 s | 0.120 s |
    | 20,000 | 0.65 s | 0.112 s |
    | 300,000 | 0.67 s | 0.116 s |

    There, beside four busy programs, the second took 0.6 to 1.2 s with any number of rounds.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


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
