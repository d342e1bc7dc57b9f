"""`lora-diffusion check` as a process of its own: it needs torch and the base, the web server has neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_diffusion
from lora_diffusion.jobs.device_lock import DEVICE, VARIABLE
from lora_diffusion.workspace import Workspace

TIMEOUT_S = 900
PYTHON = (sys.executable, "-P")
"""-P: a module in the workspace must not take the place of one of ours."""

COMMAND = (*PYTHON, "-m", "lora_diffusion")


@dataclass(frozen=True)
class Preflight:
    """report: what `check --json` printed; None where it could not look, and `error` says why."""

    report: dict[str, Any] | None
    error: str = ""


def check(workspace: Workspace, toml: str, timeout_s: float = TIMEOUT_S) -> Preflight:
    """Look at a run before it starts; may take as long as loading the base does."""
    try:
        workspace.private.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=workspace.private, prefix="check-") as folder:
            config = Path(folder) / "run.toml"
            config.write_text(toml, encoding="utf-8")
            done = subprocess.run(
                [*COMMAND, "check", "--json", "--config", str(config)],
                cwd=workspace.root,
                env=environment() | {VARIABLE: str(workspace.lock(DEVICE))},
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
            )
    except subprocess.TimeoutExpired:
        return Preflight(None, f"The check took longer than {timeout_s:.0f} s and was ended.")
    except OSError as error:
        return Preflight(None, f"The check could not be started: {error}")
    if done.returncode:
        message = done.stderr.strip() or f"The check ended with status {done.returncode}."
        return Preflight(None, message[-4000:].removeprefix("Error: ").replace(str(config), "config"))
    try:
        report = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        return Preflight(None, "The check printed no report.")
    return Preflight(report)


def environment() -> dict[str, str]:
    """So that a child finds the package wherever it was started, and no module in the folder it works in."""
    package = str(Path(lora_diffusion.__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.environ | {"PYTHONPATH": os.pathsep.join([package, *(path for path in given if os.path.isabs(path))])}
