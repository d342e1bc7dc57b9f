"""The process that works through the queue: it starts one job after the other and sees that requests are met.

It may be killed at any time. What it starts goes on without it, and the next runner finds it again: whatever matters is
in the database, in the run folders, and in the environment of the processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.jobs.condition import is_launcher_alive
from lora_diffusion.jobs.device_lock import DEVICE, VARIABLE
from lora_diffusion.jobs.hold import last_free
from lora_diffusion.jobs.launch import COMMANDS, Command
from lora_diffusion.jobs.places import config_file, output_file, runner_log
from lora_diffusion.jobs.processes import (
    TOKEN,
    interrupt,
    kill,
    processes_with,
    start_detached,
    start_time,
    terminate,
)
from lora_diffusion.jobs.store import Entry, Kind, Store
from lora_diffusion.runs import RunFolder, RunFolderError, RunState
from lora_diffusion.workspace import Workspace

logger = logging.getLogger(__name__)

_LOCK_TIMEOUT_S = 5.0  # whoever asks whether a runner lives holds the lock for a moment
_MAX_LOG_BYTES = 1_000_000
_MAX_ERRORS = 20  # in a row, each waited for a second longer: three minutes
_GRACE_WITHOUT_STEPS_S = 10.0  # before the first step there is nothing that an interruption could lose


@dataclass
class Runner:
    """Works through the queue of one workspace.

    grace_s: how long a training may show no sign of life after it was asked to stop, before it is interrupted as by
    Ctrl-C; steps slower than a twentieth of that have more. end_after_s: the same after that, before it is told to
    end. kill_after_s: the same after that, before it is killed.
    """

    workspace: Workspace
    commands: Mapping[Kind, Command] = field(default_factory=lambda: COMMANDS)
    idle_s: float = 300.0
    poll_s: float = 0.5
    grace_s: float = 120.0
    end_after_s: float = 60.0
    kill_after_s: float = 10.0
    _children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict[int, "subprocess.Popen[bytes]"])

    def run(self) -> bool:
        """Returns when there was nothing to do for `idle_s`, or False at once if another runner lives."""
        self.workspace.private.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with filelock.FileLock(self.workspace.lock("runner"), timeout=_LOCK_TIMEOUT_S):
                    self._work()
            except filelock.Timeout:
                return False
            # A job added while this one still held the lock found a living runner: look once more without it.
            if not any(entry.is_waiting for entry in self._store.entries()):
                return True

    def turn(self) -> bool:
        """Look at everything once; False if there is nothing to do or to watch."""
        self._reap()
        is_busy = False
        for entry in self._store.entries():
            if entry.launched is None or entry.ended is not None:
                continue
            if entry.launcher_pid is None:
                self._recover(entry)
                is_busy = True
                continue
            state = self._state(entry)
            if self._is_active(entry, state):
                is_busy = True
                self._insist(entry, state)
            else:
                logger.info("job %d ended", entry.id)
                self._store.change(entry.id, ended=time.time())
        return is_busy or self._launch_next()

    @property
    def _store(self) -> Store:
        return Store(self.workspace.queue)

    def _work(self) -> None:
        last_busy = time.monotonic()
        num_errors = 0
        while time.monotonic() - last_busy < self.idle_s:
            try:
                is_busy = self.turn()
                num_errors = 0
            except (UserError, OSError) as error:  # a full disk, a locked database: perhaps not for long
                num_errors += 1
                if num_errors > _MAX_ERRORS:
                    raise
                logger.warning("%s", error)
                is_busy = True
                time.sleep(num_errors)
            if is_busy:
                last_busy = time.monotonic()
            time.sleep(self.poll_s)

    def _reap(self) -> None:
        """Take notice of children that ended."""
        for id, process in list(self._children.items()):
            if process.poll() is not None:
                del self._children[id]
                self._store.change(id, exit=process.returncode)

    def _run_folder(self, entry: Entry) -> RunFolder:
        return RunFolder(self.workspace.root / entry.run)

    def _state(self, entry: Entry) -> RunState | None:
        try:
            return self._run_folder(entry).read_state()
        except RunFolderError:
            return None  # who looks at the job is told

    # Starting

    def _launch_next(self) -> bool:
        entry = self._store.take_next(last_free(self.workspace))
        if entry is None:
            return False
        state = self._state(entry)
        if state is not None and state.status == "finished" and entry.steps <= state.step:
            self._store.change(entry.id, launcher_pid=0, ended=time.time())  # it finished before it was to be resumed
            return True
        resume = self._run_folder(entry).has_checkpoint
        output = output_file(self.workspace, entry.id)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(output, b"")
        variables = {TOKEN: self._token(entry), VARIABLE: str(self.workspace.lock(DEVICE))}
        command = self.commands[entry.kind](config_file(self.workspace, entry.id), resume)
        logger.info("job %d %s: %s", entry.id, "resumes" if resume else "starts", entry.run)
        try:
            process = start_detached(command, cwd=self.workspace.root, log=output, variables=variables)
        except OSError as error:
            write_bytes_atomically(output, f"Error: {command[0]} cannot be started: {error.strerror}\n".encode())
            self._store.change(entry.id, launcher_pid=0, ended=time.time())
            return True
        self._children[entry.id] = process
        self._store.change(entry.id, launcher_pid=process.pid, launcher_start=start_time(process.pid))
        return True

    def _is_active(self, entry: Entry, state: RunState | None) -> bool:
        if is_launcher_alive(entry) or (state is not None and state.is_alive):
            return True
        # The launcher may have been killed alone, before the training process had written down that it lives.
        return bool(processes_with(self._token(entry)))

    def _recover(self, entry: Entry) -> None:
        """A runner took this job and was killed before it wrote down what it had started: find that, or start again."""
        found = processes_with(self._token(entry))
        state = self._state(entry)
        if found:
            self._store.change(entry.id, launcher_pid=found[0].pid, launcher_start=start_time(found[0].pid))
        elif state is not None and (state.is_alive or state.heartbeat >= (entry.launched or 0)):
            self._store.change(entry.id, launcher_pid=0)  # it did begin
        else:
            self._store.change(entry.id, ended=time.time(), waiting=int(entry.wanted == "run"))

    def _token(self, entry: Entry) -> str:
        return f"{self.workspace.private.resolve()}#{entry.id}#{entry.attempt}"

    # Ending

    def _insist(self, entry: Entry, state: RunState | None) -> None:
        """See that a job that is to pause or stop does: ask again, then Ctrl-C, then by force."""
        if entry.wanted == "run":
            return
        is_begun = state is not None and state.is_alive
        run = self._run_folder(entry)
        if is_begun and not (run.control / "stop").exists() and entry.forced is None:
            run.ask("stop")  # a training that was just starting has cleared away the first request
        last_sign = max(state.heartbeat if state and is_begun else 0.0, entry.forced or entry.asked or 0.0)
        silence = time.time() - last_sign
        seconds_per_step = state.seconds_per_step if state and is_begun else None
        slow = 20 * (seconds_per_step or 0.0)
        grace_s = self.grace_s if seconds_per_step else min(self.grace_s, _GRACE_WITHOUT_STEPS_S)
        if entry.asked is None:
            self._store.change(entry.id, asked=time.time())
        elif entry.forced is None:
            if silence > max(grace_s, slow):
                logger.warning("job %d does not stop; interrupting it", entry.id)
                self._store.change(entry.id, forced=time.time())
                interrupt(processes_with(self._token(entry)))
        elif silence > max(self.end_after_s, slow) + self.kill_after_s:
            kill(processes_with(self._token(entry)))
        elif silence > max(self.end_after_s, slow):
            logger.warning("job %d does not stop; ending it", entry.id)
            terminate(processes_with(self._token(entry)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Work through the queue of a workspace.")
    parser.add_argument("--root", type=Path, default=Path())
    work(Workspace(parser.parse_args().root.resolve()))


def work(workspace: Workspace) -> bool:
    """Run a runner in this process, which tells what it does. False: another one works in this workspace."""
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO)
    log = runner_log(workspace)
    if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
        os.truncate(log, 0)
    return Runner(workspace).run()


if __name__ == "__main__":
    main()
