"""Where the queue keeps a job's files, in the private folder of the workspace."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.workspace import Workspace


def config_file(workspace: Workspace, id: int) -> Path:
    """The TOML that the job is trained with."""
    return workspace.private / "jobs" / f"{id}.toml"


def output_file(workspace: Workspace, id: int) -> Path:
    """What the processes of the job's last launch printed."""
    return workspace.private / "jobs" / f"{id}.log"


def runner_log(workspace: Workspace) -> Path:
    return workspace.private / "runner.log"
