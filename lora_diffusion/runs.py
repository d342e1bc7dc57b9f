"""A run is a folder: its paths, its state, who uses it, and the files that ask a running training for something.

Another process (the web UI, a cluster job, `ls`) learns everything about a run from here; nothing imports torch.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

import filelock
import psutil

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_json_atomically

logger = logging.getLogger(__name__)

Status = Literal["running", "finished", "stopped", "failed", "died"]
Control = Literal["stop", "save_now", "sample_now"]

CONTROL_FILES: dict[str, Control] = {"stop": "stop", "save_now": "save_now", "sample_now.json": "sample_now"}
LOCK_FILES = ("run.lock", "run.lock.json")
STARTING_FILES = ("config.toml", "state.json", "log.txt", "dataset.json", "control")  # there before the first result
PROCESS_START_TOLERANCE_S = (
    2.0  # the system's boot time, which process starts are counted from, is rounded and adjusted
)
MAX_SILENCE_ELSEWHERE_S = 900.0  # encoding pictures gives no sign of life
MAX_REQUEST_BYTES = 100_000  # of a control file: some prompts and numbers
MIN_FREE_BYTES = 100_000_000  # an adapter of rank 16 with its optimiser state is about 40 MB


class RunFolderError(UserError):
    """The run folder cannot be used: not writable, in use, or it holds something that must not be mixed up."""


@dataclass(frozen=True)
class Failure:
    """Why a run ended: `kind` is the error's class, `hint` what to do about it."""

    kind: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class RunState:
    """What `state.json` says. Times are seconds since 1970; `process_start` tells a reused pid from the real one."""

    status: Status
    step: int = 0
    steps: int = 0
    pid: int = 0
    process_start: float = 0.0
    host: str = ""
    heartbeat: float = 0.0
    seconds_per_step: float | None = None
    error: Failure | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs.

        On another machine, or in a container that has been replaced, nobody can look: there it is taken at its word
        for as long as it has given one lately.
        """
        if self.status != "running":
            return False
        if self.host != socket.gethostname():
            return time.time() - self.heartbeat < MAX_SILENCE_ELSEWHERE_S
        return is_process(self.pid, self.process_start)


def is_process(pid: int, started: float) -> bool:
    """Whether process `pid` runs and is the one that started then, and not a later one with its number.

    A process that ended and that its parent has not noticed (a zombie) does not run.
    """
    try:
        process = psutil.Process(pid)
        return (
            abs(process.create_time() - started) < PROCESS_START_TOLERANCE_S
            and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.AccessDenied:
        return True  # it exists, and belongs to someone else
    except (psutil.NoSuchProcess, ValueError):
        return False


@dataclass(frozen=True)
class RunFolder:
    """One run's folder, which need not exist yet."""

    path: Path

    # Paths

    @property
    def config(self) -> Path:
        """The resolved config; training it again repeats the run."""
        return self.path / "config.toml"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line and logged step."""
        return self.path / "metrics.jsonl"

    @property
    def dataset_report(self) -> Path:
        """Every file of the data set: used or left out, and why."""
        return self.path / "dataset.json"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def log(self) -> Path:
        """What the terminal showed."""
        return self.path / "log.txt"

    @property
    def model_card(self) -> Path:
        return self.path / "README.md"

    def adapter(self, name: str, step: int | None = None) -> Path:
        """The adapter file `name`: the final one, or the one of a step."""
        return self.path / (f"{name}.safetensors" if step is None else f"{name}-{step:06d}.safetensors")

    def preview(self, step: int, index: int) -> Path:
        """The picture of prompt `index` at `step`."""
        return self.previews / f"{step:06d}-{index}.png"

    # State

    def read_state(self) -> RunState | None:
        """What the run says of itself; "died" if it says "running" and its process is gone. None: no run yet."""
        try:
            state = _state_from(json.loads(self.state_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{self.state_file} is damaged ({error}). Delete this file; checkpoints and adapters are not affected."
            ) from error
        return replace(state, status="died") if state.status == "running" and not state.is_alive else state

    def begin(self, step: int, steps: int) -> None:
        """Say that this process trains from `step` on. Call it inside `lock()`."""
        state = RunState("running", step, steps, os.getpid(), psutil.Process().create_time(), socket.gethostname())
        self._write_state(state)

    def beat(self, step: int, steps: int, seconds_per_step: float | None = None) -> None:
        """Say that the run is alive and how far it is."""
        state = self._last_written()
        self._write_state(replace(state, step=step, steps=steps, seconds_per_step=seconds_per_step))

    def end(self, status: Literal["finished", "stopped", "failed"], error: Failure | None = None) -> None:
        """Say how the run ended; step and speed stay those of the last beat."""
        self._write_state(replace(self._last_written(), status=status, error=error))

    def _last_written(self) -> RunState:
        if not self.state_file.exists():
            self.begin(0, 0)
        return _state_from(json.loads(self.state_file.read_text(encoding="utf-8")))

    def _write_state(self, state: RunState) -> None:
        write_json_atomically(self.state_file, asdict(replace(state, heartbeat=time.time())))

    # Control files

    def ask(self, control: Control, content: Mapping[str, Any] | None = None) -> None:
        """Ask the running training for something; it answers at the next step boundary.

        content: what exactly, as JSON values; `sample_now` takes prompts, seed, steps and cfg. None: as usual.
        """
        self.control.mkdir(exist_ok=True)
        name = next(name for name, meaning in CONTROL_FILES.items() if meaning == control)
        write_json_atomically(self.control / name, {"time": time.time(), **(content or {})})

    def take_control(self, of: Collection[Control] = get_args(Control)) -> dict[Control, dict[str, Any]]:
        """What was asked since the last call, with its content. Each request is returned once: its file is deleted.

        of: what is looked for; the rest stays. A file that is no JSON object is a request without content if it is
        empty (as `touch` makes it), or else left out with a warning.
        """
        taken: dict[Control, dict[str, Any]] = {}
        for name, control in CONTROL_FILES.items():
            if control not in of:
                continue
            path = self.control / f".taken-{name}"
            try:  # moved first, so that a request made while this one is read is not lost
                (self.control / name).replace(path)
            except OSError:  # there is none
                continue
            content = {} if control == "stop" else _content_of(path, name)  # a stop is a stop, whatever it says
            path.unlink(missing_ok=True)
            if content is not None:
                taken[control] = content
        return taken

    # Use by one process at a time

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process, making it if needed; the system lets go when the process ends.

        Raises RunFolderError if the folder cannot be made or another process holds it.
        """
        lock_file, owner_file = (self.path / name for name in LOCK_FILES)
        held = filelock.FileLock(lock_file, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except filelock.Timeout:
            raise RunFolderError(
                f"{self.path} is in use by {_owner(owner_file)}. Stop that run, or choose another folder with "
                "--set run.output=…"
            ) from None
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            try:
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
                write_json_atomically(owner_file, owner)
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            yield
        finally:
            owner_file.unlink(missing_ok=True)
            held.release()

    def prepare(self, *, resume: bool = False, min_free_bytes: int = MIN_FREE_BYTES) -> Path | None:
        """Make the folder ready for a run, before anything slow happens. Call it inside `lock()`.

        A new run needs a folder without results. A run that ended, or that has no checkpoint to continue from, makes
        room: all its files move to `<output>-previous-1` (or -2, …), which is returned. Nothing that took time to make
        is deleted or overwritten; a start that failed before it made anything is simply repeated in place.
        Raises RunFolderError if the folder cannot be written or the disk is nearly full, if it holds an unfinished run
        and `resume` is False, if there is nothing to resume, or if it holds files that are not a run's.
        """
        self.check_start(resume=resume, min_free_bytes=min_free_bytes)
        contents = self._contents()
        if resume or all(entry.name in STARTING_FILES for entry in contents):
            self.take_control()
            return None
        return self._move_to_previous(contents)

    def check_start(self, *, resume: bool = False, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        """Raises what `prepare` would, and changes nothing."""
        self._check_writable(min_free_bytes)
        state = self.read_state()
        contents = self._contents()
        if resume and state is None and not self.has_checkpoint:
            raise RunFolderError(
                f"--resume: {self.path} holds no run. Start without --resume, or check run.output for a typo."
            )
        if resume or all(entry.name in STARTING_FILES for entry in contents):
            return
        if state is None and not self.config.exists():
            raise RunFolderError(
                f"{self.path} is not empty and holds no run ({contents[0].name}, …). Choose another folder with "
                "--set run.output=…"
            )
        if self.has_checkpoint and (state is None or state.status != "finished"):
            how_far = f"{state.status} at step {state.step} of {state.steps}" if state else "it has no state.json"
            raise RunFolderError(
                f"{self.path} holds an unfinished run ({how_far}). Add --resume to continue it, or start anew in "
                "another folder with --set run.output=…"
            )

    def _contents(self) -> list[Path]:
        return [entry for entry in sorted(self.path.iterdir()) if entry.name not in LOCK_FILES]

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from; whether it is whole is checked when it is read."""
        return self.checkpoints.is_dir() and any(entry.name.isdecimal() for entry in self.checkpoints.iterdir())

    def _check_writable(self, min_free_bytes: int) -> None:
        try:
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if free < min_free_bytes:
            raise RunFolderError(
                f"{self.path}: the disk is nearly full: {free / 1e6:.0f} MB free, {min_free_bytes / 1e6:.0f} needed. "
                "Free some space, or choose a folder on another disk with --set run.output=…"
            )

    def _move_to_previous(self, contents: list[Path]) -> Path:
        """Move everything but the lock, which stays held; `state.json` last, so that an interruption shows."""
        number = 1
        while (previous := self.path.with_name(f"{self.path.name}-previous-{number}")).exists():
            number += 1
        try:
            previous.mkdir()
            for entry in sorted(contents, key=lambda entry: entry == self.state_file):
                entry.rename(previous / entry.name)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: the earlier run in it could not be moved to {previous}: {error.strerror}. "
                "Move it yourself, or choose another folder with --set run.output=…"
            ) from error
        return previous


def _state_from(values: Any) -> RunState:
    """Raises ValueError, TypeError or KeyError if `values` is not what a run wrote; unknown keys are left out."""
    if not isinstance(values, dict):
        raise TypeError("it holds no JSON object")
    known = {field.name for field in fields(RunState)}
    error = Failure(**values["error"]) if values.get("error") else None
    state = RunState(**{**{key: value for key, value in values.items() if key in known}, "error": error})
    if state.status not in get_args(Status) or not isinstance(state.step, int) or not isinstance(state.pid, int):
        raise ValueError(f"status {state.status!r}, step {state.step!r}, pid {state.pid!r}")
    return state


def _content_of(path: Path, name: str) -> dict[str, Any] | None:
    """A control file's JSON object without the time it was written at; None if it holds something else."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_REQUEST_BYTES + 1)
        if len(raw) > MAX_REQUEST_BYTES:
            raise ValueError(f"it is longer than {MAX_REQUEST_BYTES} bytes")
        content = json.loads(raw) if raw.strip() else {}
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("control/%s is passed over: %s", name, error)
        return None
    return {key: value for key, value in content.items() if key != "time"}


def _owner(owner_file: Path) -> str:
    try:
        owner = json.loads(owner_file.read_text(encoding="utf-8"))
        since = datetime.fromtimestamp(owner["since"]).astimezone().isoformat(" ", "seconds")
        return f"process {int(owner['pid'])} on {owner['host']} since {since}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"  # it has just taken the lock and not signed yet


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    obstacle = next((parent for parent in (path, *path.parents) if parent.exists() and not parent.is_dir()), None)
    if obstacle:
        reason = f"{obstacle} is a file, not a folder"
    elif error.errno == errno.ENOSPC:
        reason = "the disk is full"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "no permission to write there"
    else:
        reason = error.strerror or str(error)
    return RunFolderError(f"{path} cannot be written: {reason}. Choose another folder with --set run.output=…")
