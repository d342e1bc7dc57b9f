"""The picture engine of the workspace, over HTTP on this machine: found, started for a base, asked to draw.

It is a process of its own that outlives the web UI, and keeps its base in memory until it has had nothing to draw for
some time, or a job wants the device. Nobody else sees its token.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_json_atomically
from lora_diffusion.generation.request import Request
from lora_diffusion.jobs import device_lock as lock
from lora_diffusion.jobs.processes import reap_when_done, start_detached, start_time
from lora_diffusion.runs import is_process
from lora_diffusion.workspace import Workspace
from webui.services.bases import base_argument
from webui.services.drawings import NoLongerWanted, Progress, Report, Stopped
from webui.services.machine import read_machine

RECORD = "engine.json"
LOG = "engine.log"
STARTED = "engine-base.json"
"""Ours: which base the process was started for. The engine's own record names it without its folder."""

START_TIMEOUT_S = 900.0
IDLE_S = 600.0
"""So long an engine without work keeps its base in memory, unless a job wants the device."""
_POLL_S = 0.15
_WINDOW = 24
"""Orders that are given at once: the engine draws what can share a batch together."""


class EngineError(UserError):
    """The engine could not be started, or is gone."""


@dataclass(frozen=True)
class Record:
    """Where a running engine listens."""

    pid: int
    url: str
    token: str
    base: str

    @property
    def base_name(self) -> str:
        return Path(self.base).name.removesuffix(".safetensors")


@dataclass
class Engine:
    """adapters: folders in the order in which names are given. names: what the library has now."""

    workspace: Workspace
    adapters: Sequence[Path]
    names: Callable[[], frozenset[str]]
    start_timeout_s: float = START_TIMEOUT_S
    _known_names: frozenset[str] = frozenset()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self) -> Record | None:
        """The running engine; None if there is none, or another process has its number now."""
        try:
            values = json.loads((self.workspace.private / RECORD).read_text(encoding="utf-8"))
            pid = int(values["pid"])
            if not is_process(pid, float(values["process_start"])):
                return None
            host = str(values["host"])
            host = f"[{host}]" if ":" in host else host.replace("0.0.0.0", "127.0.0.1")
            url = f"http://{host}:{int(values['port'])}"
            return Record(pid, url, str(values["token"]), self._base_of(pid) or str(values["base"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def draw(self, base: str, requests: Sequence[Request], report: Report, stopped: Stopped) -> Iterator[bytes]:
        """As `Draws` says. Starts the engine, or starts it anew where it has another base."""
        with self._lock:
            record = self.ready(base, report, stopped)
            headers = {"Authorization": f"Bearer {record.token}"}
            with httpx.Client(base_url=record.url, headers=headers, timeout=60.0, trust_env=False) as client:
                if self.names() != self._known_names:
                    _ask(client, "POST", "/v1/adapters/refresh")
                    self._known_names = self.names()
                yield from _draw(client, requests, report, stopped)

    def ready(self, base: str, report: Report, stopped: Stopped) -> Record:
        """The engine with this base. Raises EngineError with the end of its log where it does not start."""
        record = self.record()
        if record is not None:
            if record.base in (base, Path(base).name.removesuffix(".safetensors")) and _is_healthy(record):
                return record
            end(record)
        self._known_names = frozenset()
        with self._device(report, stopped):
            report(Progress("starting"))
            return self._start(base, report, stopped)

    def stop(self) -> None:
        """End the engine, if there is one, also one that still loads: its memory is free then."""
        record = self.record()
        if record is not None:
            end(record)
        self._starting("")

    @contextmanager
    def _device(self, report: Report, stopped: Stopped) -> Iterator[None]:
        """Hold the device while a base is loaded: beside what another process has in memory there may be no room."""
        path = self.workspace.lock("cuda-0" if read_machine().is_gpu else "cpu")

        def is_over() -> bool:
            report(Progress("in line", 1, note=f"waiting for the device ({lock.holder_of(path)})"))
            return stopped()

        try:
            with lock.device_lock(path, "the picture engine", is_over):
                yield
        except lock.NoLongerWanted:
            raise NoLongerWanted from None

    def _start(self, base: str, report: Report, stopped: Stopped) -> Record:
        found = self._starting(base)
        process = found or self._launch(base)
        began = time.monotonic()
        while time.monotonic() < began + self.start_timeout_s:
            if stopped():
                _kill(process)
                raise NoLongerWanted
            if not _is_alive(process):
                if process is not found:
                    raise EngineError(_reason(self._log))
                process = self._launch(base)  # the other one had nothing to draw and was about to end
            record = self.record()
            if record is not None and record.pid == process.pid and _is_healthy(record):
                return record
            report(Progress("starting", note=f"{time.monotonic() - began:.0f} s"))
            time.sleep(_POLL_S)
        _kill(process)
        raise EngineError(f"The base did not load within {self.start_timeout_s:.0f} s.")

    def _starting(self, base: str) -> psutil.Process | None:
        """The engine that a web UI which is gone has started, and that does not listen yet: two would not fit.

        One with another base is ended.
        """
        try:
            started = json.loads((self.workspace.private / STARTED).read_text(encoding="utf-8"))
            if not is_process(int(started["pid"]), float(started["process_start"])):
                return None
            process = psutil.Process(int(started["pid"]))
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        if started.get("base") == base:
            return process
        _kill(process)
        return None

    def _launch(self, base: str) -> psutil.Process:
        for folder in (self.workspace.adapters, self.workspace.runs):
            folder.mkdir(parents=True, exist_ok=True)  # what is put there later is found too
        folders = [folder for folder in self.adapters if folder.is_dir()]
        self._known_names = self.names()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_bytes(b"")
        command = [
            *(sys.executable, "-m", "lora_diffusion", "serve", "--base", base_argument(self.workspace.root, base)),
            *(argument for folder in folders for argument in ("--adapters", str(folder))),
            *("--workspace", str(self.workspace.root), "--port", "0", "--end-when-idle", f"{IDLE_S:g}"),
        ]
        process = start_detached(command, cwd=self.workspace.root, log=self._log, variables={})
        record = {"pid": process.pid, "process_start": start_time(process.pid), "base": base}
        write_json_atomically(self.workspace.private / STARTED, record)
        found = psutil.Process(process.pid)
        reap_when_done(process)
        return found

    @property
    def _log(self) -> Path:
        return self.workspace.private / LOG

    def _base_of(self, pid: int) -> str:
        try:
            started = json.loads((self.workspace.private / STARTED).read_text(encoding="utf-8"))
            return str(started["base"]) if started["pid"] == pid else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def end(record: Record) -> None:
    """Ask the engine to end, and end it if it does not."""
    with suppress(httpx.HTTPError):
        httpx.post(
            f"{record.url}/v1/shutdown", headers={"Authorization": f"Bearer {record.token}"}, timeout=5, trust_env=False
        )
    try:
        process = psutil.Process(record.pid)
        process.wait(20)
    except psutil.TimeoutExpired:
        psutil.Process(record.pid).kill()
    except psutil.Error:
        pass


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    """At once: what does not listen yet has nothing to lose."""
    with suppress(psutil.Error):
        process.kill()
        process.wait(20)


def _draw(client: httpx.Client, requests: Sequence[Request], report: Report, stopped: Stopped) -> Iterator[bytes]:
    orders: dict[int, str] = {}
    given = 0
    try:
        for index in range(len(requests)):
            while given < min(len(requests), index + _WINDOW):
                orders[given] = _order(client, requests[given])
                given += 1
            yield _wait(client, orders[index], report, stopped)
            del orders[index]
    finally:
        for id in orders.values():
            try:
                client.delete(f"/v1/images/{id}")
            except httpx.HTTPError:
                break


def _order(client: httpx.Client, request: Request) -> str:
    """The order's id. A name that the engine does not know may belong to a new file: it looks again."""
    try:
        return _ask(client, "POST", "/v1/images", json=_body(request))["id"]
    except EngineError:
        raise
    except UserError as error:
        if not str(error).startswith("There is no adapter"):
            raise
    _ask(client, "POST", "/v1/adapters/refresh")
    return _ask(client, "POST", "/v1/images", json=_body(request))["id"]


def _wait(client: httpx.Client, id: str, report: Report, stopped: Stopped) -> bytes:
    url = f"/v1/images/{id}"
    while True:
        if stopped():
            raise NoLongerWanted
        answer = _ask(client, "GET", url)
        progress = answer["progress"]
        match answer["status"]:
            case "done":
                if notes := answer.get("notes"):  # an engine of an earlier version has none
                    report(Progress("drawing", warnings=tuple(notes)))
                return _read(client, answer["images"][0])
            case "failed":
                raise UserError(answer["error"] or "The engine could not draw this.")
            case "cancelled":
                raise EngineError("The engine was ended.")
            case "running":
                report(Progress("drawing", 0, progress["step"], progress["steps"], _preview(client, url)))
            case _:
                report(Progress("in line", answer["position"] + 1, note=answer["message"]))
        time.sleep(_POLL_S)


def _ask(client: httpx.Client, method: str, url: str, **options: Any) -> dict[str, Any]:
    """The answer. Raises UserError with the engine's own words."""
    try:
        answer = client.request(method, url, **options)
        values = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(
            f"The engine does not answer ({type(error).__name__}). Draw again to start it anew."
        ) from None
    if answer.status_code >= 400:
        raise UserError(str(values.get("error", answer.status_code)))
    return values


def _read(client: httpx.Client, url: str) -> bytes:
    try:
        return client.get(url).raise_for_status().content
    except httpx.HTTPError as error:
        raise EngineError(f"The picture was lost ({type(error).__name__}). Draw it again.") from None


def _preview(client: httpx.Client, url: str) -> bytes:
    try:
        answer = client.get(f"{url}/preview.jpg")
        return answer.content if answer.status_code == 200 else b""
    except httpx.HTTPError:
        return b""


def _body(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": request.seed,
        "steps": request.steps,
        "cfg": request.cfg,
        "size": list(request.size) if request.size else None,
        "sampler": request.sampler,
        "clip_skip": request.clip_skip,
        "adapters": dict(request.adapters),
    }


def _is_healthy(record: Record) -> bool:
    headers = {"Authorization": f"Bearer {record.token}"}
    try:
        answer = httpx.get(f"{record.url}/v1/health", headers=headers, timeout=10, trust_env=False)
        return answer.status_code == 200
    except httpx.HTTPError:
        return False


def _reason(log: Path) -> str:
    """The end of the engine's log."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    text = "\n".join(lines[-6:])[-1500:]
    return f"The engine did not start.\n{text}".strip()
