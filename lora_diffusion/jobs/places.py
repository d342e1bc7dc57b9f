"""Where the queue keeps a job's files, in the private folder of the workspace."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.workspace import Workspace


def config_file(workspace: Workspace, id: int) -> Path:
    """The job's TOML: what it is trained with, or the order of a captioning."""
    return workspace.private / "jobs" / f"{id}.toml"


def output_file(workspace: Workspace, id: int) -> Path:
    """What the processes of the job's last launch printed."""
    return workspace.private / "jobs" / f"{id}.log"


def caption_folder(config: Path) -> Path:
    """The folder of a captioning whose order is in `config`: a run folder with proposals in it."""
    return config.with_suffix("")


def runner_log(workspace: Workspace) -> Path:
    return workspace.private / "runner.log"
