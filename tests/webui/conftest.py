"""The web UI for tests: a workspace with runs, a queue with a fake trainer, the server in a thread, a browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from lora_diffusion.jobs.condition import ACTIVE
from lora_diffusion.jobs.launch import COMMANDS
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.jobs.runner import Runner
from lora_diffusion.runs import Failure, RunFolder, RunState
from lora_diffusion.workspace import Workspace
from tests.webui.fake_trainer import fake_command

if TYPE_CHECKING:
    from webui.services.site import Site

HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>${alert(3)}{{alert(4)}}"
QUESTIONS = "**/component_server/**"
"""What the page of data sets asks the server."""
_NO_STYLES = "Unable to preload CSS for "
CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_story.py")  # minutes long: the others run beside it


@pytest.fixture()
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "workspace")


def make_workspace(root: Path) -> Workspace:
    """Pictures with captions, one run that ended and one that failed; hostile texts wherever files hold texts."""
    pictures = root / "data" / "shapes"
    pictures.mkdir(parents=True)
    for index in range(6):
        _picture(index * 40).save(pictures / f"{index}.png")
        if index:
            (pictures / f"{index}.txt").write_text(HOSTILE if index == 1 else f"a shape, number {index}")
    make_run(root / "runs" / "done", steps=200, prompts=["a red house", HOSTILE])
    failure = Failure("RunError", f"the loss is nan {HOSTILE}", "Lower optimizer.lr.")
    make_run(root / "runs" / "broken", steps=40, status="failed", error=failure, total=200)
    return Workspace(root)


def make_run(
    folder: Path,
    *,
    steps: int,
    total: int = 0,
    status: Any = "finished",
    prompts: list[str] | None = None,
    error: Failure | None = None,
) -> None:
    """A run folder as a training leaves it."""
    run = RunFolder(folder)
    run.previews.mkdir(parents=True)
    (run.checkpoints / f"{steps:06d}").mkdir(parents=True)
    name = folder.name
    run.config.write_text(
        f'[run]\nname = "{name}"\noutput = "runs/{name}"\nsteps = {total or steps}\n[model]\npath = "base"\n'
        f'[[dataset]]\npath = "data/shapes"\n[preview]\nprompts = {json.dumps(prompts or ["a red house"])}\n'
    )
    with run.metrics.open("w") as file:
        for step in range(1, steps + 1):
            row = {"segment": 0, "step": step, "loss": 1 / step + 0.1, "lr": 1e-4}
            file.write(json.dumps(row | ({"val_loss": 0.2} if step % 50 == 0 else {})) + "\n")
    for step in range(0, steps + 1, 100):
        for index in range(len(prompts or [""])):
            _picture(step).save(run.preview(step, index))
    if steps >= 100:
        run.adapter(name, 100).write_bytes(b"adapter of step 100")
    if status == "finished":
        run.adapter(name).write_bytes(b"adapter")
    run.log.write_text(f"started\n{HOSTILE}\nended\n")
    state = RunState(status, steps, total or steps, 0, time.time() - 90, socket.gethostname(), time.time(), 0.25, error)
    run._write_state(state)


def _picture(hue: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), (20, 24, 40))
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=(hue % 256, 120, 200))
    return image


@pytest.fixture()
def queue(workspace: Workspace) -> Iterator[Queue]:
    """A queue whose runner works in a thread and starts the fake trainer."""
    queue = Queue(workspace, start_runner=lambda _: None)
    runner = Runner(workspace, commands=COMMANDS | {"train": fake_command}, poll_s=0.05)
    is_over = threading.Event()

    def work() -> None:
        while not is_over.wait(0.05):
            runner.turn()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield queue
    for job in queue.jobs():
        if job.status in (*ACTIVE, "queued"):
            queue.stop(job.id)
    wait_for(lambda: not any(job.status in ACTIVE for job in queue.jobs()))
    is_over.set()
    thread.join()


def wait_for(is_so: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


@pytest.fixture()
def url(workspace: Workspace, queue: Queue) -> Iterator[str]:
    """The address of a server of the workspace."""
    from webui.services.site import make_site

    with served(make_site(workspace.root, queue=queue)) as url:
        yield url


@contextmanager
def served(site: Site) -> Iterator[str]:
    """The address of a server of `site`, in a thread."""
    import uvicorn

    from webui.server import make_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(make_app(site), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


class Pages:
    """Opens pages and notes errors in the browser and requests to anywhere else."""

    def __init__(self, browser: Any) -> None:
        self.errors: list[str] = []
        self._refused: set[str] = set()
        self._lost: set[str] = set()
        self._browser = browser
        self._contexts: list[Any] = []

    def __call__(self, address: str, width: int = 1280, height: int = 900, **options: Any) -> Any:
        size = {"width": width, "height": height}
        context = self._browser.new_context(
            **{"locale": "en-US", "viewport": size, "reduced_motion": "reduce", **options}
        )
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("response", lambda response: response.status >= 400 and self._refused.add(response.url))
        page.on("requestfailed", lambda request: _is_given_up(request) or self._lost.add(request.url))
        page.on("request", lambda request: _is_outside(request.url) and self.errors.append(f"outside: {request.url}"))
        page.goto(address)
        return page

    def forgive_lost_connections(self) -> None:
        """Forget the errors that the browser and Gradio's script note when the server is gone."""
        lost = ("net::ERR_", "AbortError: signal is aborted", "Connection errored out")
        self.errors = [error for error in self.errors if not any(text in error for text in lost)]
        self._lost.clear()  # style sheets that a page was loading then

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self.errors = [error for error in self.errors if not self._was_left(error)]

    def _was_left(self, error: str) -> bool:
        """Whether it only says that a page was left while it loaded: its style sheets are there, but were given up."""
        address = error.removeprefix(_NO_STYLES)
        return error.startswith(_NO_STYLES) and address not in self._refused | self._lost


@pytest.fixture()
def open_page(browser: Any) -> Iterator[Pages]:
    """Opens a page; afterwards the test fails for errors in the browser and for requests to anywhere else."""
    pages = Pages(browser)
    yield pages
    pages.close()
    assert pages.errors == []


def lose(page: Any, *questions: str) -> None:
    """Let what the page asks get no answer, until `page.unroute(QUESTIONS)`; only these questions if some are named."""

    def end(route: Any) -> None:
        asked = json.loads(route.request.post_data)["data"]["do"]
        if not questions or asked in questions:
            route.abort()
        else:
            route.continue_()

    page.route(QUESTIONS, end)


def open_with_loss(open_page: Pages, address: str, question: str) -> Any:
    """The page of `address`, which has got no answer to `question` once."""
    page = open_page("about:blank")
    lose(page, question)
    with page.expect_event("requestfailed", lambda request: "component_server" in request.url):
        page.goto(address)
    page.unroute(QUESTIONS)
    return page


def _is_outside(address: str) -> bool:
    return not address.startswith(("http://127.0.0.1:", "data:", "blob:"))


def _is_given_up(request: Any) -> bool:
    """Whether the browser itself ended a request, as it does with those of a page that is left."""
    return request.failure == "net::ERR_ABORTED"
