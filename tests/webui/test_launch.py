"""Starting and ending the web UI from a terminal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from webui.launch import Options, address_of

START_S = 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_announced_end_is_no_failure_and_a_start_prints_no_warning(tmp_path: Path, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lora_diffusion", "ui", "--root", str(tmp_path), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    with subprocess.Popen(
        [*command, "--no-browser"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for_answer(f"http://127.0.0.1:{port}/healthz", process)
        process.send_signal(number)
        printed, told = process.communicate(timeout=60)

    assert process.returncode == 0
    assert told == ""
    assert printed.startswith("The web UI of ")


def wait_for_answer(url: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    process.kill()
    pytest.fail(f"no answer: {process.communicate()}")


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "http://127.0.0.1:7860"), ("::1", "http://[::1]:7860"), ("::", "http://127.0.0.1:7860")],
)
def test_the_address_can_be_typed_into_a_browser(host: str, address: str) -> None:
    assert address_of(Options(host)) == address
