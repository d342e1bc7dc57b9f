"""The queue as others see it: what waits, runs and ended, and what can be asked of it. No torch.

The database knows what was asked for; how a job is, is looked up at every call (`condition.py`).
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomlkit

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_captions import CaptionOrder
from lora_diffusion.files import write_text_atomically
from lora_diffusion.jobs.condition import ACTIVE, Condition, JobStatus, condition_of, condition_of_run
from lora_diffusion.jobs.hold import hold_after, release
from lora_diffusion.jobs.launch import ensure_runner
from lora_diffusion.jobs.places import caption_folder, config_file, output_file
from lora_diffusion.jobs.store import Entry, Kind, QueueError, Store, Wanted
from lora_diffusion.runs import Failure, RunFolder, RunState
from lora_diffusion.workspace import Workspace

__all__ = ["Job", "JobStatus", "Queue", "QueueError", "ensure_runner"]


@dataclass(frozen=True)
class Job:
    """One entry of the queue, or a run that was started from a terminal, as it is now. Times: seconds since 1970."""

    id: int
    """Negative for a run from a terminal: the same at every call, until the queue is asked to do something with it."""
    kind: Kind
    name: str
    """Of the run; of a captioning, its folder's."""
    run: Path
    """Run folder; of a captioning, whose steps are pictures, one that is private to the queue."""
    status: JobStatus
    position: int | None
    """From 1, of those that wait."""
    step: int
    steps: int
    """0 while only the data set could tell."""
    seconds_per_step: float | None
    error: Failure | None
    """Why it failed or was interrupted."""
    created: float
    started: float | None
    ended: float | None

    @property
    def title(self) -> str:
        """What it is called among jobs of all kinds."""
        return self.name if self.kind == "train" else f"captions of {self.name}"


class Queue:
    """The jobs of one workspace. Any number of processes may have one; each call stands for itself.

    Methods that take an id raise QueueError if there is no such job or it cannot do that now. Asking for what is so
    already changes nothing.
    """

    def __init__(self, workspace: Workspace, start_runner: Callable[[Workspace], bool | None] = ensure_runner) -> None:
        """start_runner: called when there is something to do for the process that works through the queue.

        It returns whether it had to start one.
        """
        self.workspace = Workspace(workspace.root.resolve())
        self._store = Store(self.workspace.queue)
        self._start_runner = start_runner

    # Looking

    def jobs(self) -> list[Job]:
        """Those of the queue: what ended or runs by age, then what waits in its order; then runs from a terminal."""
        jobs: list[Job] = []
        entries = self._store.entries()
        num_waiting = 0
        for entry in entries:
            if entry.forgotten is not None:
                continue
            condition = self._condition(entry)
            num_waiting += condition.status == "queued"
            jobs.append(self._job(entry, condition, num_waiting if condition.status == "queued" else None))
        return jobs + self._foreign_jobs(entries)

    def job(self, id: int) -> Job:
        found = _find(self.jobs(), id)
        if found is None:
            raise QueueError(f"There is no job {id}. `lora-diffusion queue list` shows those there are.")
        return found

    def config(self, id: int) -> str:
        """The job's TOML."""
        return self.config_of(self.job(id))

    def config_of(self, job: Job) -> str:
        """The TOML of a job that `jobs` gave. Raises QueueError where it cannot be read."""
        path = config_file(self.workspace, job.id) if job.id > 0 else RunFolder(job.run).config
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise QueueError(f"{path} cannot be read: {error.strerror}") from error

    # Adding

    def add(self, toml: str, *, name: str | None = None, start: bool = True) -> Job:
        """Put a run at the end of the queue. Raises ConfigError with everything that is wrong with `toml`.

        name: takes the place of `run.name`, of which the run folder's name is made; `-2` and so on follows where a
        folder or another job has it already. A folder that the config names is used if it is free. start: also start
        the process that works through the queue, unless one lives.
        """
        config = TrainConfig.parse(toml)
        if name is not None:
            toml = _with_run_keys(toml, name=name)
            config = TrainConfig.parse(toml)

        def prepare(id: int, taken: set[str]) -> str:
            run = self._make_run_folder(config.run.output, taken)
            config_file(self.workspace, id).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(config_file(self.workspace, id), _with_run_keys(toml, output=run))
            return run

        id = self._store.add(config.run.name, config.run.steps or 0, prepare)
        if start:
            self._start_runner(self.workspace)
        return self.job(id)

    def add_captions(self, order: CaptionOrder, *, start: bool = True) -> Job:
        """Put a captioning at the end of the queue. Relative paths in `order` count from the workspace's root.

        start: as of `add`.
        """

        def prepare(id: int, taken: set[str]) -> str:
            config = config_file(self.workspace, id)
            folder = caption_folder(config)
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(config, order.to_toml())
            return folder.relative_to(self.workspace.root).as_posix()

        id = self._store.add(order.caption.folder.name, 0, prepare, kind="caption")
        if start:
            self._start_runner(self.workspace)
        return self.job(id)

    def captions_order(self, job: Job) -> CaptionOrder:
        """What a captioning is to do. Raises ConfigError or QueueError where that cannot be read."""
        return CaptionOrder.parse(self.config_of(job), str(config_file(self.workspace, job.id)))

    def duplicate(self, id: int) -> str:
        """TOML for a new run with the job's settings and a name that is free."""
        self._check_training(self.job(id))
        toml = self.config(id)
        name = TrainConfig.parse(toml).run.name
        taken = {job.name for job in self.jobs()} | {job.run.name for job in self.jobs()}
        return _with_run_keys(toml, name=_free(name, taken), output=None)

    # Asking

    def pause(self, id: int) -> None:
        """Save everything, free the device, and wait to be resumed. A job that waits leaves the queue until then."""
        self._end(id, "pause")

    def stop(self, id: int) -> None:
        """Save everything and end."""
        self._end(id, "stop")

    def cancel(self, id: int) -> None:
        """Take a job that waits out of the queue."""
        if self.job(id).status in ACTIVE:
            raise QueueError(f"Job {id} has begun: stop it, which saves what it has learned, or pause it.")
        self._end(id, "stop")

    def resume(self, id: int) -> None:
        """Continue a job that ended early, before all others that wait: from its newest checkpoint if it has one."""
        self._again(id, first=True)

    def resume_paused(self, ids: Sequence[int]) -> None:
        """The same for jobs that are paused or about to be, in this order; what someone has changed stays as it is.

        That is a job which was stopped, resumed or taken off the list since.
        """
        jobs = self.jobs()
        paused = [job.id for id in ids if (job := _find(jobs, id)) and job.id > 0 and self._is_paused(job)]
        if paused:
            self._store.enqueue(*paused, first=True)
            self._start_runner(self.workspace)

    def retry(self, id: int) -> None:
        """As `resume`, after all others that wait."""
        self._again(id, first=False)

    def move(self, id: int, position: int) -> None:
        """Give a waiting job a position, from 1."""
        self._store.move(self.job(id).id, position)
        self._start_runner(self.workspace)

    def hold_new(self) -> None:
        """Let jobs that are added from now on wait until `release_new`, or until this process ends."""
        hold_after(self.workspace, max((entry.id for entry in self._store.entries()), default=0))

    def release_new(self) -> None:
        release(self.workspace)

    def keep_going(self) -> bool:
        """Start the process that works through the queue if there is work and it is gone: killed, or the machine was.

        Returns whether it had to be started.
        """
        return any(entry.needs_runner for entry in self._store.entries()) and bool(self._start_runner(self.workspace))

    def forget(self, id: int) -> None:
        """Take a job off the list. Its run folder stays, and is listed again if it is trained again."""
        job = self._adopted(id)
        if job.status in ACTIVE:
            raise QueueError(f"Job {id} is at work: stop it first.")
        self._store.change(job.id, waiting=0, wanted="stop", forgotten=time.time())

    def _end(self, id: int, wanted: Wanted) -> None:
        job = self._adopted(id)
        if job.status == "queued" or (wanted == "stop" and job.status == "paused"):
            self._store.change(job.id, waiting=0, wanted=wanted)
            job = self.job(job.id)  # the runner may have taken it at the same moment
        if job.status not in ACTIVE:
            return
        entry = self._store.entry(job.id)
        if entry.wanted != wanted:
            self._store.change(job.id, waiting=0, wanted=wanted, asked=entry.asked or time.time())
        if job.run.is_dir():
            RunFolder(job.run).ask("stop")
        if entry.launched is not None:
            self._start_runner(self.workspace)  # it insists if the training does not react

    def _again(self, id: int, *, first: bool) -> None:
        job = self._adopted(id)
        entry = self._store.entry(job.id)
        if job.status == "finished" and entry.steps <= job.step:
            self._check_training(job)
            raise QueueError(f"Job {id} is finished. Duplicate it to train it again with other settings.")
        if job.status != "queued" and not (job.status in ACTIVE and entry.wanted == "run"):
            self._store.enqueue(job.id, first=first)
        self._start_runner(self.workspace)

    def _is_paused(self, job: Job) -> bool:
        """Or about to be. One that left the line so looks as its last start ended, which may be a failure."""
        entry = self._store.entry(job.id)
        has_left_line = entry.asked is None and not entry.is_waiting
        return entry.wanted == "pause" and (has_left_line or job.status in ("paused", *ACTIVE))

    def _check_training(self, job: Job) -> None:
        if job.kind != "train":
            raise QueueError(f"Job {job.id} is no training but a captioning. Queue another one in its place.")

    # Rows and folders

    def _condition(self, entry: Entry) -> Condition:
        return condition_of(entry, RunFolder(self.workspace.root / entry.run), output_file(self.workspace, entry.id))

    def _job(self, entry: Entry, condition: Condition, position: int | None) -> Job:
        state = condition.state
        is_over = condition.status not in ("queued", *ACTIVE)
        return Job(
            id=entry.id,
            kind=entry.kind,
            name=entry.name,
            run=self.workspace.root / entry.run,
            status=condition.status,
            position=position,
            step=state.step if state else 0,
            steps=state.steps if state and (condition.status in ACTIVE or not entry.steps) else entry.steps,
            seconds_per_step=_speed(condition),
            error=condition.error,
            created=entry.created,
            started=entry.started or (state.process_start if state else None),
            ended=max(state.heartbeat if state else 0.0, entry.ended or 0.0) or None if is_over else None,
        )

    def _foreign_jobs(self, entries: list[Entry]) -> list[Job]:
        owned = {self.workspace.root / entry.run for entry in entries if entry.forgotten is None}
        forgotten = {self.workspace.root / entry.run: entry.forgotten for entry in entries if entry.forgotten}
        jobs: list[Job] = []
        for folder in self.workspace.run_folders():
            if folder in owned or _is_leftover(folder):
                continue
            condition = condition_of_run(RunFolder(folder))
            state = condition.state
            if state and state.heartbeat < forgotten.get(folder, 0.0):
                continue
            jobs.append(_foreign_job(folder, condition, state))
        return jobs

    def _adopted(self, id: int) -> Job:
        """The job; a run from a terminal becomes an entry of the queue first."""
        job = self.job(id)
        if job.id > 0:
            return job
        toml = self.config(id)
        config = TrainConfig.parse(toml, str(RunFolder(job.run).config))

        def prepare(new_id: int, taken: set[str]) -> str:
            run = job.run.relative_to(self.workspace.root).as_posix()
            config_file(self.workspace, new_id).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(config_file(self.workspace, new_id), _with_run_keys(toml, output=run))
            return run

        return self.job(self._store.add(config.run.name, config.run.steps or 0, prepare, waiting=False))

    def _make_run_folder(self, wanted: Path, taken: Container[str]) -> str:
        """Makes the first of `wanted`, `wanted-2`, … that is empty and no job's; returns it as configs say it."""
        number = 1
        while True:
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            folder = self.workspace.root / path
            if folder.is_relative_to(self.workspace.root):
                path = folder.relative_to(self.workspace.root)
            is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
            if path.as_posix() not in taken and is_free:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise QueueError(
                        f"{folder}: the run folder cannot be made ({error.strerror}). Choose another run.output, or "
                        "another --root."
                    ) from None
                return path.as_posix()
            number += 1


def _speed(condition: Condition) -> float | None:
    state = condition.state
    return (state.seconds_per_step or None) if state and condition.status == "running" else None


def _is_leftover(folder: Path) -> bool:
    """Whether a start that came to nothing was moved aside here when the run was started again."""
    if not re.fullmatch(r".+-previous-\d+", folder.name):
        return False
    return not RunFolder(folder).has_checkpoint and not any(folder.glob("*.safetensors"))


def _find(jobs: Sequence[Job], id: int) -> Job | None:
    found = next((job for job in jobs if job.id == id), None)
    if found is None and id < 0:  # it was taken into the queue since the caller looked
        found = next((job for job in jobs if _foreign_id(job.run) == id), None)
    return found


def _foreign_id(folder: Path) -> int:
    return -1 - zlib.crc32(folder.name.encode())


def _foreign_job(folder: Path, condition: Condition, state: RunState | None) -> Job:
    return Job(
        id=_foreign_id(folder),
        kind="train",
        name=folder.name,
        run=folder,
        status=condition.status,
        position=None,
        step=state.step if state else 0,
        steps=state.steps if state else 0,
        seconds_per_step=_speed(condition),
        error=condition.error,
        created=folder.stat().st_mtime if state is None else state.process_start,
        started=state.process_start if state else None,
        ended=state.heartbeat if state and condition.status not in ACTIVE else None,
    )


def _with_run_keys(toml: str, **keys: str | None) -> str:
    """The TOML with keys of [run] set, or taken out where they are None; comments stay."""
    document = tomlkit.parse(toml)
    table = document["run"]
    for key, value in keys.items():
        if value is not None:
            table[key] = value  # pyright: ignore[reportIndexIssue]
        elif key in table:  # pyright: ignore[reportOperatorIssue]
            del table[key]  # pyright: ignore[reportIndexIssue]
    return tomlkit.dumps(document)


def _free(name: str, taken: Container[str]) -> str:
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"
