"""Processes that outlive the one that starts them, and how to find and end them later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

TOKEN = "LORA_DIFFUSION_JOB"
"""Environment variable that a job's processes, and those they start, carry with the job's token."""

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def start_detached(
    command: Sequence[str], *, cwd: Path, log: Path, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, its output added to `log`.

    It sees the same lora_diffusion as this process, and nothing in `cwd` can take the place of a Python module.
    """
    paths = [str(_PACKAGE_PARENT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)), "PYTHONSAFEPATH": "1"}
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=flags,
        )


def reap_when_done(process: subprocess.Popen[bytes]) -> None:
    """Take notice of the end of `process` whenever it comes, so that no zombie stays as long as this process lives."""
    threading.Thread(target=process.wait, daemon=True, name=f"wait for {process.pid}").start()


def start_time(pid: int) -> float:
    """When process `pid` started, in seconds since 1970; 0 if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def processes_with(token: str) -> list[psutil.Process]:
    """Living processes that carry the token, the oldest first. Looks at every process: not for every second."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # gone, or somebody else's
            continue
    return sorted(found, key=_age)


def interrupt(processes: Sequence[psutil.Process]) -> None:
    """What Ctrl-C in a terminal does to a program and those it started. Windows knows no such thing from outside."""
    if os.name != "nt":
        _signal(processes, signal.SIGINT)


def terminate(processes: Sequence[psutil.Process]) -> None:
    _signal(processes, signal.SIGTERM)


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def _age(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0
