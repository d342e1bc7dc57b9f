"""What is so now: a job's status from its run folder and its processes, and why it ended."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_diffusion.files import last_bytes
from lora_diffusion.jobs.store import Entry, Kind
from lora_diffusion.runs import Failure, RunFolder, RunFolderError, RunState, is_process

JobStatus = Literal[
    "queued", "starting", "running", "paused", "finished", "stopped", "failed", "interrupted", "cancelled"
]
ACTIVE: tuple[JobStatus, ...] = ("starting", "running")

_PROCESSES: dict[Kind, str] = {"train": "training", "caption": "captioning"}
_LAST_BYTES = 16_000
_ENDED_BY = re.compile(rb"died with <Signals\.\w+: (\d+)>")  # how Python's subprocess tells it, for accelerate
_TRACEBACK = (" ", "Traceback", "subprocess.CalledProcessError")  # accelerate's, after what the training process said
_ERROR = re.compile(r"^Error: (.+?)(?=^Traceback|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Condition:
    """How a job is. state: what its run folder says, whichever start that is from."""

    status: JobStatus
    state: RunState | None = None
    error: Failure | None = None


def condition_of(entry: Entry, run: RunFolder, output: Path) -> Condition:
    """Looks at the run folder and at processes; trusts the entry only for what was wanted and when.

    output: what the processes of the last launch printed.
    """
    try:
        state = run.read_state()
    except RunFolderError as error:
        return Condition("failed", None, Failure("RunFolderError", str(error)))
    if state is not None and state.is_alive:
        return Condition("running" if state.seconds_per_step else "starting", state)
    if entry.is_waiting:
        return Condition("queued", state)
    is_told = state is not None and (entry.launched is None or state.heartbeat >= entry.launched)
    if is_told and state is not None and state.status != "died":
        return _told(entry, state)
    if is_launcher_alive(entry) and not is_told:
        return Condition("starting", state)
    return _untold(entry, state, run, output, was_begun=is_told)


def condition_of_run(run: RunFolder) -> Condition:
    """The same for a run that was started from a terminal."""
    try:
        state = run.read_state()
    except RunFolderError as error:
        return Condition("failed", None, Failure("RunFolderError", str(error)))
    if state is None:
        return Condition("cancelled")
    if state.is_alive:
        return Condition("running" if state.seconds_per_step else "starting", state)
    if state.status == "died":
        return Condition("interrupted", state, _interruption(run, state))
    return Condition(state.status if state.status != "running" else "interrupted", state, state.error)


def is_launcher_alive(entry: Entry) -> bool:
    return bool(entry.launcher_pid) and is_process(entry.launcher_pid or 0, entry.launcher_start or 0.0)


def _told(entry: Entry, state: RunState) -> Condition:
    """The run itself said how it ended."""
    if state.status == "finished":
        return Condition("finished", state)
    if state.status == "stopped":
        return Condition("paused" if entry.wanted == "pause" else "stopped", state)
    return Condition("failed", state, state.error)


def _untold(entry: Entry, state: RunState | None, run: RunFolder, output: Path, *, was_begun: bool) -> Condition:
    """Its process is gone and said nothing, or nothing was ever started."""
    if entry.launched is None and state is None:
        return Condition("paused" if entry.wanted == "pause" else "cancelled")
    has_lost_steps = was_begun and state is not None and bool(state.seconds_per_step)
    if entry.wanted != "run" and not has_lost_steps:
        return Condition("paused" if entry.wanted == "pause" else "stopped", state)
    printed = last_bytes(output, _LAST_BYTES)
    number = -entry.exit if entry.exit is not None and entry.exit < 0 else None
    if number is None and (found := _ENDED_BY.findall(printed)):
        number = int(found[-1])
    message = _printed_error(printed)
    if not was_begun and number is None and message:
        return Condition("failed", state, Failure("StartFailed", message))
    was_forced = entry.forced is not None and entry.wanted != "run"
    told = _interruption(run, state if was_begun else None, number, was_forced, what=_PROCESSES[entry.kind])
    return Condition("interrupted", state, told)


def _interruption(
    run: RunFolder,
    state: RunState | None,
    number: int | None = None,
    was_forced: bool = False,
    what: str = "training",
) -> Failure:
    when = f"at step {state.step} of {state.steps}" if state else "before it began"
    how = "ended without saying why: it was killed, or the machine stopped,"
    if was_forced:
        how = "did not stop when it was asked to, and was ended by force"
    elif number is not None:
        how = f"was ended by signal {number} ({_signal_name(number)})"
    hint = "Resume continues from the newest checkpoint." if run.has_checkpoint else "Resume starts it anew."
    if number == getattr(signal, "SIGKILL", None) and not was_forced:
        hint += " A signal 9 that nobody sent is usually the system running out of memory."
    lines = last_bytes(run.log, 2000).decode("utf-8", "replace").strip().splitlines()
    if state and lines:
        hint += f" Last line of the log: {lines[-1]}"
    return Failure("Interrupted", f"The {what} process {how} {when}.", hint)


def _printed_error(printed: bytes) -> str:
    """What a command of ours printed as its error, or else the last line that tells something."""
    text = printed.decode("utf-8", "replace")
    if errors := _ERROR.findall(text):
        return errors[-1].strip()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_TRACEBACK)]
    return lines[-1].strip() if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
