"""Starting the processes of the queue: the one that works through it, and what that one starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import filelock

from lora_diffusion.jobs.places import caption_folder, runner_log
from lora_diffusion.jobs.processes import reap_when_done, start_detached
from lora_diffusion.jobs.store import Kind
from lora_diffusion.workspace import Workspace

Command = Callable[[Path, bool], list[str]]
"""(the job's TOML, whether to resume) → its command line."""


def train_command(config: Path, resume: bool) -> list[str]:
    """One training process, through accelerate's launcher with everything said that it would ask for.

    It has as many threads as OMP_NUM_THREADS says, or as there are cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    # Not with --quiet, which keeps back the signal that ended the training process.
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", threads if threads.isdecimal() else str(cores)),
        *("-m", "lora_diffusion", "train", "--config", str(config)),
        *(("--resume",) if resume else ()),
    ]


def caption_command(config: Path, resume: bool) -> list[str]:
    """One captioning process. It goes on with the pictures that are left whether or not it is to resume."""
    words = ("caption-job", str(config), str(caption_folder(config)))
    return [sys.executable, "-m", "lora_diffusion", *words]


COMMANDS: dict[Kind, Command] = {"train": train_command, "caption": caption_command}


def ensure_runner(workspace: Workspace) -> bool:
    """Start the process that works through the workspace's queue, unless one lives. Returns at once: whether it did."""
    workspace.private.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(workspace.lock("runner"), timeout=0):
            pass
    except filelock.Timeout:
        return False
    root = workspace.root.resolve()
    command = [sys.executable, "-m", "lora_diffusion.jobs.runner", "--root", str(root)]
    reap_when_done(start_detached(command, cwd=root, log=runner_log(workspace), variables={}))
    return True
