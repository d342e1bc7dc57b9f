"""Choosing another step's adapter file as the result of a run."""

from __future__ import annotations

import json
import re
import time
import tomllib
from functools import lru_cache
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically, write_json_atomically
from lora_diffusion.runs import RunFolder

RELEASE = "release.json"
_STEP = re.compile(r"\d{6,8}")


def release(run: RunFolder, step: int) -> Path:
    """Make `<name>-000200.safetensors` the run's `<name>.safetensors`; returns that.

    The final adapter stays as `<name>-<last step>.safetensors`, so releasing the last step takes the choice back.
    Raises UserError while the run goes on, and if there is no adapter of that step.
    """
    state = run.read_state()
    if state is None or state.is_alive:
        raise UserError(f"{run.path}: the run has not ended; when it does it writes its result. Choose after that.")
    chosen = next((path for found, path in adapters_by_step(run).items() if found == step), None)
    if chosen is None:
        known = ", ".join(str(found) for found in adapters_by_step(run)) or "none"
        raise UserError(f"{run.path} has no adapter file of step {step}. There are: {known}.")
    name = chosen.stem.rpartition("-")[0]
    final = run.adapter(name)
    if final.exists() and released_step(run) is None:
        kept = run.adapter(name, state.step)
        if not kept.exists():
            write_bytes_atomically(kept, final.read_bytes())
    write_bytes_atomically(final, chosen.read_bytes())
    stat = final.stat()
    signature = {"size": stat.st_size, "modified_ns": stat.st_mtime_ns}
    write_json_atomically(run.path / RELEASE, {"step": step, "file": final.name, "time": time.time(), **signature})
    return final


def released_step(run: RunFolder) -> int | None:
    """The step whose adapter was chosen; None if none was, or if the run wrote a new result since."""
    try:
        said = json.loads((run.path / RELEASE).read_text(encoding="utf-8"))
        stat = (run.path / Path(said["file"]).name).stat()
        is_same = (stat.st_size, stat.st_mtime_ns) == (said["size"], said["modified_ns"])
        return int(said["step"]) if is_same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def adapters_by_step(run: RunFolder) -> dict[int, Path]:
    """Step → adapter file, in order."""
    steps = {path: step_of(path) for path in run.path.glob("*.safetensors")}
    return dict(sorted((step, path) for path, step in steps.items() if step is not None))


def step_of(adapter: Path) -> int | None:
    """The step that an adapter file of a run was saved at, as its name says; None for the run's result.

    `cat-20241101.safetensors` is the result of a run of that name, and of a step where the run is called `cat`.
    """
    name, _, digits = adapter.stem.rpartition("-")
    is_of_step = bool(name) and _STEP.fullmatch(digits) and _run_name(RunFolder(adapter.parent)) in (name, None)
    return int(digits) if is_of_step else None


def _run_name(run: RunFolder) -> str | None:
    """What the run calls its adapters; None without a config that tells it."""
    try:
        return _name_in(run.config, run.config.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=1024)
def _name_in(config: Path, changed_ns: int) -> str:
    """changed_ns: of the file, so that each version of it is read once; lists are made of thousands of adapters."""
    return str(tomllib.loads(config.read_text(encoding="utf-8"))["run"]["name"])
