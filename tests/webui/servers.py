"""The web UI as users start it: a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
_WITHOUT_RUNNER = """
import webui.launch
webui.launch.keep_queue_going = lambda queue: None
from lora_diffusion.cli import app
app()
"""


@dataclass
class WebServer:
    """`lora-diffusion ui` of one workspace."""

    root: Path
    url: str
    started: subprocess.Popen[bytes]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.started.pid)

    def kill(self) -> None:
        self.started.kill()
        self.started.wait()

    def stop(self) -> None:
        """End it, and the engine that it started, which goes on otherwise."""
        from lora_diffusion.workspace import Workspace
        from webui.services.engine import Engine

        self.started.send_signal(signal.SIGTERM)
        try:
            self.started.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        Engine(Workspace(self.root), [], frozenset).stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_web_server(root: Path, port: int | None = None, *, starts_runner: bool = True) -> WebServer:
    """Returns when it answers. starts_runner: as users have it; not where the runner is the test's own."""
    port = port or free_port()
    program = ["-m", "lora_diffusion"] if starts_runner else ["-c", _WITHOUT_RUNNER]
    command = [sys.executable, *program, "ui", "--no-browser", "--root", str(root), "--port", str(port)]
    with (root / "ui.txt").open("ab") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    server = WebServer(root, f"http://127.0.0.1:{port}", started)
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert started.poll() is None, (root / "ui.txt").read_text()
        try:
            if httpx.get(f"{server.url}/healthz", timeout=5, trust_env=False).status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.1)
    server.kill()
    raise AssertionError(f"the web UI did not answer within {START_S} s")
