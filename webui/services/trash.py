"""Deleting is moving into the workspace's trash, where files can be taken back."""

from __future__ import annotations

import time
from pathlib import Path

from lora_diffusion.workspace import Workspace


def move_to_trash(workspace: Workspace, path: Path) -> Path:
    """Where the file is now. Never overwrites what is there."""
    folder = workspace.root / "trash" / time.strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    target, number = folder / path.name, 2
    while target.exists():
        target, number = folder / f"{path.stem} {number}{path.suffix}", number + 1
    path.rename(target)
    return target
