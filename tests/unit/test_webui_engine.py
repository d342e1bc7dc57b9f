"""The web UI's side of the engine: how it is started, shown and ended. A small HTTP server stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lora_diffusion.cli import app
from lora_diffusion.generation.request import Request
from lora_diffusion.jobs.device_lock import NoLongerWanted as Refused
from lora_diffusion.jobs.device_lock import device_lock, holder_of
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.runs import RunFolder
from lora_diffusion.workspace import Workspace
from tests.grey_engine import clicked
from tests.queues import wait_for
from webui.pages.generate.results import Shown
from webui.services import engine as module
from webui.services.drawings import NoLongerWanted, Progress
from webui.services.engine import RECORD, STARTED
from webui.services.machine import read_machine
from webui.services.site import Site, make_site
from webui.translate import Translator

FAKE = """
import http.server, json, os, pathlib, psutil, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        os._exit(0)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
process = psutil.Process()
told = {"pid": process.pid, "process_start": process.create_time(), "host": "127.0.0.1", "token": "t", "base": "b"}
record = pathlib.Path(sys.argv[1])
record.with_suffix(".new").write_text(json.dumps(told | {"port": server.server_port}))
record.with_suffix(".new").replace(record)
server.serve_forever()
"""
T = Translator("en")


@pytest.fixture()
def site(tmp_path: Path) -> Site:
    (tmp_path / "models").mkdir()
    return make_site(tmp_path, queue=Queue(Workspace(tmp_path), start_runner=lambda _: None))


@pytest.fixture()
def commands(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The command lines of engines that were started; what runs in their place."""
    given: list[list[str]] = []
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], **_: Any) -> subprocess.Popen[bytes]:
        given.append(command)
        started.append(subprocess.Popen([sys.executable, "-c", FAKE, str(site.workspace.private / RECORD)]))
        return started[-1]

    monkeypatch.setattr(module, "start_detached", start)
    yield given
    for process in started:
        process.kill()
        process.wait()


def ready(site: Site, base: str) -> module.Record:
    return site.studio.engine.ready(base, lambda _: None, lambda: False)


def test_the_engine_is_started_so_that_it_gives_its_memory_back(site: Site, commands: list[list[str]]) -> None:
    ready(site, "models/b")

    ((_, _, _, name, *options),) = commands
    context = typer_command(name).make_context(name, options)
    assert context.params["end_when_idle"] == module.IDLE_S
    assert context.params["base"] == str(site.workspace.root / "models/b")


def test_a_base_of_the_hub_is_named_to_the_engine_as_it_is(site: Site, commands: list[list[str]]) -> None:
    assert ready(site, "owner/name").base == "owner/name"

    (command,) = commands
    assert command[command.index("--base") + 1] == "owner/name"


def test_the_page_shows_an_idle_engine_and_ends_it(site: Site, commands: list[list[str]]) -> None:
    shown = Shown(site, T)
    assert 'data-act="free"' not in shown.draw("a tab")[0]
    pid = ready(site, "models/my base.safetensors").pid
    assert "my base is in memory" in shown.draw("a tab")[0]

    said = shown.act(clicked(act="free"))

    assert "memory is free" in said
    assert not psutil.pid_exists(pid) and site.studio.engine.record() is None
    assert 'data-act="free"' not in shown.draw("a tab")[0]


def test_an_engine_that_is_just_ending_is_followed_by_another(site: Site, commands: list[list[str]]) -> None:
    """It does not listen any more: as one does not yet that a web UI which is gone has started."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]) as ending:
        started = {"pid": ending.pid, "process_start": psutil.Process(ending.pid).create_time(), "base": "models/b"}
        site.workspace.private.mkdir(exist_ok=True)
        (site.workspace.private / STARTED).write_text(json.dumps(started))

        record = ready(site, "models/b")

    assert len(commands) == 1 and record.pid != ending.pid


def test_while_another_process_has_the_device_no_base_is_loaded_beside_its_own(
    site: Site, commands: list[list[str]]
) -> None:
    path = site.workspace.lock("cuda-0" if read_machine().is_gpu else "cpu")
    told: list[Progress] = []
    wanted = threading.Event()
    wanted.set()

    def order(pool: ThreadPoolExecutor) -> Future[module.Record]:
        told.clear()
        return pool.submit(site.studio.engine.ready, "models/b", told.append, lambda: not wanted.is_set())

    with ThreadPoolExecutor() as pool:
        with device_lock(path, "the training of ink"):
            cancelled = order(pool)
            wait_for(lambda: bool(told))
            wanted.clear()
            with pytest.raises(NoLongerWanted):
                cancelled.result(10)
            wanted.set()
            drawn = order(pool)
            wait_for(lambda: len(told) > 2)
            assert {(progress.phase, progress.position) for progress in told} == {("in line", 1)}
            assert told[0].note == f"waiting for the device (the training of ink, process {os.getpid()})"
            assert commands == []
        assert drawn.result(60).base == "models/b"
    assert len(commands) == 1
    assert told[-1].phase == "starting"


def test_the_choices_are_shown_while_a_run_trains_and_need_no_engine(site: Site, commands: list[list[str]]) -> None:
    path = site.workspace.lock("cuda-0" if read_machine().is_gpu else "cpu")
    run, desk = RunFolder(site.workspace.runs / "ink"), site.studio.desk
    run.path.mkdir(parents=True)
    run.prepare(resume=False)
    with run.lock(), device_lock(path, "the training of ink"):
        run.begin(1, 9)
        desk.add("pictures", "models/b", [Request("a red house")])
        wait_for(lambda: desk.drawings()[0].phase == "in line")
        shown = Shown(site, T).draw("a tab")[0]
        assert all(f'data-act="{act}"' in shown for act in ("live", "pause", "wait"))

        assert "ink draws it" in Shown(site, T).act(clicked(act="live"))

        wait_for(lambda: desk.drawings()[0].phase == "cancelled")
    assert commands == []


def test_the_device_is_held_while_the_base_is_loaded_and_free_for_the_drawing(
    site: Site, commands: list[list[str]]
) -> None:
    path = site.workspace.lock("cuda-0" if read_machine().is_gpu else "cpu")
    holders: list[str] = []

    def report(progress: Progress) -> None:
        if progress.phase == "starting":
            holders.append(holder_of(path))
            with pytest.raises(Refused), device_lock(path, "a training", lambda: True):
                pytest.fail("a training took the device")

    site.studio.engine.ready("models/b", report, lambda: False)

    assert set(holders) == {f"the picture engine, process {os.getpid()}"}
    with device_lock(path, "a training", lambda: True):
        pass


def typer_command(name: str) -> Any:
    from typer.main import get_command

    return get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("answer", "told"), [({"notes": ["odd: alpha is 0"]}, [("odd: alpha is 0",)]), ({}, [])])
def test_what_the_engine_notes_of_adapters_is_reported(answer: dict[str, Any], told: list[tuple[str, ...]]) -> None:
    def answered(request: httpx.Request) -> httpx.Response:
        done = {"status": "done", "progress": {"step": 1, "steps": 1}, "images": ["/v1/images/x/0.png"]}
        return (
            httpx.Response(200, content=b"png")
            if request.url.path.endswith("png")
            else httpx.Response(200, json=done | answer)
        )

    reports: list[Progress] = []
    with httpx.Client(transport=httpx.MockTransport(answered), base_url="http://engine") as client:
        assert module._wait(client, "x", reports.append, lambda: False) == b"png"
    assert [progress.warnings for progress in reports] == told
