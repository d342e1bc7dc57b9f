"""Fifty programs at once against the real web UI process: no errors, quick answers, bounded lines and memory."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.queues import kill_all, start_runner
from tests.webui.clients import PICTURE, Program, Seen
from tests.webui.conftest import make_workspace
from tests.webui.servers import ROOT, WebServer, start_web_server
from webui.services.drawings import MAX_WAITING

SAMPLES = ROOT / "samples"
NUM_CLIENTS = 50
NUM_PROCESSES = 5
SECONDS = 60.0
P95_S = 1.0
GROWTH_BYTES = 48 * 2**20
"""What the second half of the minute may add: caches that fill, and memory that Python's allocator keeps."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    """`lora-diffusion ui` over a workspace with the shipped base; runs are the fake trainer's."""
    workspace = make_workspace(tmp_path / "workspace")
    for name in ("base", "adapters"):
        shutil.copytree(SAMPLES / name, workspace.root / "samples" / name)
    runner = start_runner(workspace.root, idle_s=600)
    server = start_web_server(workspace.root)
    try:
        yield server
    finally:
        server.stop()
        runner.kill()
        runner.wait()
        kill_all(workspace.root)


def start_clients(url: str) -> list[subprocess.Popen[str]]:
    """Processes with ten clients each, all of them connected."""
    each = NUM_CLIENTS // NUM_PROCESSES
    command = [sys.executable, "-m", "tests.webui.clients", url]
    processes = [
        subprocess.Popen(
            [*command, str(number * each), str(each), str(SECONDS)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in range(NUM_PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
    return processes


@pytest.mark.timed
@pytest.mark.slow
def test_fifty_clients_for_a_minute_see_no_error_and_do_not_wait(server: WebServer) -> None:
    processes = start_clients(server.url)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    time.sleep(SECONDS / 2)
    half = server.process.memory_info().rss
    seen = [json.loads(process.communicate(timeout=SECONDS + 90)[0]) for process in processes]
    growth = server.process.memory_info().rss - half

    report(seen, half, growth)
    waited = [seconds for one in seen for _, seconds in one["calls"]]
    assert [error for one in seen for error in one["errors"]] == []
    assert len(waited) > NUM_CLIENTS * SECONDS / 4
    assert statistics.quantiles(waited, n=20)[-1] < P95_S
    assert growth < GROWTH_BYTES
    program = Program(server.url, Seen(), NUM_CLIENTS)
    check_that_the_line_is_bounded(program)
    check_that_nothing_was_lost(program, [run for one in seen for run in one["runs"]])
    assert len(list((server.root / "pictures").glob("*.png"))) > 20


def report(seen: list[dict[str, Any]], half: int, growth: int) -> None:
    by_name: dict[str, list[float]] = {}
    for one in seen:
        for name, seconds in one["calls"]:
            by_name.setdefault(name, []).append(seconds)
            by_name.setdefault("all", []).append(seconds)
    for name, all_seconds in by_name.items():
        p95 = statistics.quantiles(all_seconds, n=20)[-1]
        print(f"{name}: {len(all_seconds)} calls, p50 {statistics.median(all_seconds):.3f} s, p95 {p95:.3f} s")
    print(f"busy {sum(one['busy'] for one in seen)}; {half / 2**20:.0f} MB, then {growth / 2**20:+.0f} MB")


def check_that_the_line_is_bounded(program: Program) -> None:
    """More orders than the line takes: a clear word, and no more in line."""
    for seed in range(MAX_WAITING + 40):
        program.call("draw", seed=seed, **PICTURE | {"steps": 50})
    assert program.seen.busy > 0, "the engine does not draw forty such pictures in that time"
    assert program.client.predict(api_name="/status")["drawings"] <= MAX_WAITING
    assert program.seen.errors == []


def check_that_nothing_was_lost(program: Program, asked: list[str]) -> None:
    """Every run that was accepted has a folder of its own, and ended or waits."""
    known = {run["id"]: run for run in program.client.predict(api_name="/list_runs")}
    assert asked and set(asked) <= known.keys()
    assert len(set(asked)) == len(asked), "two clients were given one folder"
    bad = [id for id, run in known.items() if run["status"] in ("failed", "interrupted")]
    assert bad == ["runs/broken"]  # which the workspace came with
