"""Jobs that are added later wait for as long as a process wants it; one that ends lets them go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lora_diffusion.files import write_json_atomically
from lora_diffusion.jobs.processes import start_time
from lora_diffusion.runs import is_process
from lora_diffusion.workspace import Workspace


def hold_after(workspace: Workspace, id: int) -> None:
    """Let jobs with a greater id wait until `release`, or until this process ends."""
    _record(workspace).parent.mkdir(parents=True, exist_ok=True)
    pid = os.getpid()
    write_json_atomically(_record(workspace), {"pid": pid, "process_start": start_time(pid), "last": id})


def release(workspace: Workspace) -> None:
    _record(workspace).unlink(missing_ok=True)


def last_free(workspace: Workspace) -> int | None:
    """The greatest id that is not held back; None if nobody holds jobs back."""
    try:
        held = json.loads(_record(workspace).read_text(encoding="utf-8"))
        return int(held["last"]) if is_process(int(held["pid"]), float(held["process_start"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(workspace: Workspace) -> Path:
    return workspace.private / "held-jobs.json"
